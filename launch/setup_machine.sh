#!/usr/bin/env bash
# Makes VENV and installs onellm_dist with its development tools in it; adds the one Debian package it needs where it may.
# usage: setup_machine.sh PYTHON VENV
set -euo pipefail
python=${1:-python3}
venv=${2:-.venv}

say() { printf 'setup: %s\n' "$*"; }

need_debian() { # need_debian COMMAND PACKAGE WHY
    command -v "$1" >/dev/null 2>&1 && return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing Debian package $2 ($3)"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >/dev/null && return 0
    fi
    say "no '$1' here and no right to install it: $3 will not work. Ask for the package $2."
}

"$python" - <<'PY' || { say "Python 3.10 or newer with venv is needed (Debian: python3-venv)"; exit 1; }
import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 10))
PY
need_debian g++ g++ "DeepSpeed's CPU communication op, compiled once at the first run on a machine without a GPU,"

[ -x "$venv/bin/python" ] || { say "making $venv"; "$python" -m venv "$venv"; }
say "installing packages (about 6 GB with torch; a minute or two)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
"$venv/bin/python" -m pip check
say "done"
