#!/usr/bin/env bash
# Makes VENV and installs onellm_dist with its development tools in it; adds the few Debian packages it needs where it may.
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

need_slurm() { # a Slurm of its own for `onellm rehearse` and the tests; none of its daemons is started or enabled here
    local packages=(slurm-wlm munge pdsh openssh-server iproute2) missing=()
    if command -v srun >/dev/null 2>&1 && ! command -v slurmctld >/dev/null 2>&1; then
        say "this machine uses a cluster's Slurm: it is left as it is; \`onellm rehearse\` needs a machine of its own."
        return 0
    fi
    for tool in slurmctld:slurm-wlm slurmd:slurm-wlm srun:slurm-wlm munged:munge pdsh:pdsh sshd:openssh-server ip:iproute2; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${tool%%:*}" >/dev/null 2>&1 || missing+=("${tool##*:}")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    if [ "${ONELLM_SLURM:-1}" = 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        say "no Slurm here and no right to install it: \`onellm rehearse\` and its tests will not run. Ask for: ${packages[*]}."
        return 0
    fi
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    say "installing Debian packages ${missing[*]} (a throw-away Slurm for rehearsals; ONELLM_SLURM=0 leaves them out)"
    local guard=/usr/sbin/policy-rc.d own_guard=0 done=0
    if [ ! -e "$guard" ]; then # Debian starts daemons at installation (sshd on port 22!) unless this file forbids it
        printf '#!/bin/sh\nexit 101\n' >"$guard" && chmod +x "$guard" && own_guard=1
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && done=1
    if [ "$own_guard" = 1 ]; then
        rm -f "$guard"
        for package in "${missing[@]}"; do # nor at the next boot
            case $package in openssh-server) units="ssh" ;; slurm-wlm) units="slurmctld slurmd" ;; munge) units="munge" ;; *) units="" ;; esac
            for unit in $units; do systemctl disable --quiet "$unit" 2>/dev/null || true; done
        done
    fi
    [ "$done" = 1 ] || say "apt could not install them: \`onellm rehearse\` and its tests will not run."
}

"$python" - <<'PY' || { say "Python 3.10 or newer with venv is needed (Debian: python3-venv)"; exit 1; }
import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 10))
PY
need_debian g++ g++ "DeepSpeed's CPU communication op, compiled once at the first run on a machine without a GPU,"
need_slurm

[ -x "$venv/bin/python" ] || { say "making $venv"; "$python" -m venv "$venv"; }
say "installing packages (about 6 GB with torch; a minute or two)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
"$venv/bin/python" -m pip check
say "done"
