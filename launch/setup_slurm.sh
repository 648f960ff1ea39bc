#!/usr/bin/env bash
# Installs a Slurm of its own for `onellm rehearse` and the tests, where it may; none of its daemons is started or enabled.
# usage: setup_slurm.sh [STAMP]   STAMP is touched where all of it is there
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # a user's PATH does not have them on Debian
stamp=${1:-}

say() { printf 'setup: %s\n' "$*"; }

packages=(slurm-wlm munge pdsh openssh-server iproute2) missing=()
if command -v srun >/dev/null 2>&1 && ! command -v slurmctld >/dev/null 2>&1; then
    say "this machine uses a cluster's Slurm: it is left as it is; \`onellm rehearse\` needs a machine of its own."
    exit 0
fi
for tool in slurmctld:slurm-wlm slurmd:slurm-wlm srun:slurm-wlm munged:munge pdsh:pdsh sshd:openssh-server ip:iproute2; do
    command -v "${tool%%:*}" >/dev/null 2>&1 || missing+=("${tool##*:}")
done
if [ "${#missing[@]}" = 0 ]; then
    [ -z "$stamp" ] || touch "$stamp"
    exit 0
fi
if [ "${ONELLM_SLURM:-1}" = 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    say "no Slurm here and no right to install it: \`onellm rehearse\` and its tests will not run. Ask for: ${packages[*]}."
    exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
say "installing Debian packages ${missing[*]} (a throw-away Slurm for rehearsals; ONELLM_SLURM=0 leaves them out)"
guard=/usr/sbin/policy-rc.d own_guard=0 done=0
if [ ! -e "$guard" ]; then # Debian starts daemons at installation (sshd on port 22!) unless this file forbids it
    trap 'rm -f "$guard"' EXIT # also where we are interrupted
    printf '#!/bin/sh\nexit 101\n' >"$guard" && chmod +x "$guard" && own_guard=1
fi
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && done=1
if [ "$own_guard" = 1 ]; then
    for package in "${missing[@]}"; do # nor at the next boot
        case $package in openssh-server) units="ssh ssh.socket" ;; slurm-wlm) units="slurmctld slurmd" ;; munge) units="munge" ;; *) units="" ;; esac
        for unit in $units; do systemctl disable --quiet "$unit" 2>/dev/null || true; done
    done
fi
if [ "$done" = 1 ]; then
    [ -z "$stamp" ] || touch "$stamp"
else
    say "apt could not install them: \`onellm rehearse\` and its tests will not run."
fi
