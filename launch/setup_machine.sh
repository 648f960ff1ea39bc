#!/usr/bin/env bash
# Makes VENV and installs onellm_dist with its development tools in it. Safe to run again.
# usage: setup_machine.sh PYTHON VENV
# environment: ONELLM_EXTRAS  extras of setup.cfg to install (default: dev,docs)
#              ONELLM_TORCH   what to install torch from first, for a build other than the registry's default (CPU only, an
#                             older CUDA): a version, a wheel file, or pip arguments. torch's pins in constraints.txt then do
#                             not apply.
set -euo pipefail
python=${1:-python3}
venv=${2:-.venv}
extras=${ONELLM_EXTRAS:-dev,docs}

say() { printf 'setup: %s\n' "$*"; }
fail() {
    say "$@"
    exit 1
}

"$python" - <<'PY' || fail "Python 3.10 or newer with venv is needed (Debian: python3-venv); choose one: make setup PYTHON=python3.12"
import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 10))
PY
# A venv whose creation was interrupted has no pip: make it again.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || {
    say "making $venv"
    "$python" -m venv "$venv"
}
log=$(mktemp)
constraints=$(mktemp)
trap 'rm -f "$log" "$constraints"' EXIT
pip_install() { # prints pip's own reason where it fails
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 && return 0
    tail -n 15 "$log" >&2
    fail "pip could not install $*. Without a network, set PIP_FIND_LINKS and PIP_NO_INDEX=1 to a folder of wheels; behind a mirror, set PIP_INDEX_URL."
}
cp constraints.txt "$constraints"
if [ -n "${ONELLM_TORCH:-}" ]; then
    say "installing torch from: $ONELLM_TORCH"
    # shellcheck disable=SC2086 # several pip arguments are allowed
    pip_install $ONELLM_TORCH
    grep -vE '^(torch|torchvision|triton|nvidia-|cuda-)' constraints.txt >"$constraints"
fi
rm -rf onellm_dist.egg-info # an earlier version's metadata would be found first
free_gb=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
if [ "$free_gb" -lt 10 ] && [ ! -e "$venv/.installed" ]; then
    say "only $free_gb GB are free where $venv lies: the packages take 7, and the tests some 9 in ${TMPDIR:-/tmp}."
fi
say "installing packages (about 7 GB with torch for CUDA; a minute or two)"
pip_install --constraint "$constraints" --editable ".[$extras]"
"$venv/bin/python" -m pip check
say "done: source $venv/bin/activate"
