#!/usr/bin/env bash
# Makes VENV and installs onellm_dist with its development tools in it; adds the two Debian packages it needs where it may.
# usage: setup_machine.sh PYTHON VENV
set -euo pipefail
python=${1:-python3}
venv=${2:-.venv}

say() { printf 'setup: %s\n' "$*"; }

need_debian() { # need_debian PACKAGE WHY TEST...
    local package=$1 why=$2
    shift 2
    "$@" >/dev/null 2>&1 && return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing Debian package $package ($why)"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null && return 0
    fi
    say "$package is not here and cannot be installed: $why will not work. Ask for it."
}
has_header() {
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

"$python" - <<'PY' || { say "Python 3.10 or newer with venv is needed (Debian: python3-venv)"; exit 1; }
import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 10))
PY
op="DeepSpeed's CPU communication op, compiled once at the first run on a machine without a GPU,"
need_debian g++ "$op" command -v g++
need_debian "$("$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')" "$op" has_header

# A venv that was interrupted before it had pip is no venv.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || { say "making $venv"; "$python" -m venv "$venv"; }
say "installing packages (about 6 GB with torch; a minute or two)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
"$venv/bin/python" -m pip check
say "done"
