#!/usr/bin/env bash
# Installs Debian's Slurm for `onellm rehearse` and its tests, if this user may. None of its daemons
# is started or enabled.
# usage: setup_slurm.sh [STAMP]   STAMP is touched once everything is installed
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # Debian leaves them out of a user's PATH
stamp=${1:-}

say() { printf 'setup: %s\n' "$*"; }

packages=(slurm-wlm munge pdsh openssh-server iproute2) missing=()
if command -v srun >/dev/null 2>&1 && ! command -v slurmctld >/dev/null 2>&1; then
    say "this machine uses a cluster's Slurm, which is left as it is; \`onellm rehearse\` needs a machine of its own."
    exit 0
fi
for tool in slurmctld:slurm-wlm slurmd:slurm-wlm srun:slurm-wlm munged:munge pdsh:pdsh \
    sshd:openssh-server ip:iproute2; do
    command -v "${tool%%:*}" >/dev/null 2>&1 || missing+=("${tool##*:}")
done
if [ "${#missing[@]}" = 0 ]; then
    [ -z "$stamp" ] || touch "$stamp"
    exit 0
fi
if [ "${ONELLM_SLURM:-1}" = 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    say "Slurm is not installed, and cannot be installed here: \`onellm rehearse\` and its tests will not run. Ask for: ${packages[*]}."
    exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
say "installing Debian packages ${missing[*]} (a throw-away Slurm for rehearsals; ONELLM_SLURM=0 leaves them out)"
# Debian starts daemons at their installation (sshd on port 22!) unless this file forbids it.
policy=/usr/sbin/policy-rc.d own_policy=0 installed=0
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT # also if this script is interrupted
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && own_policy=1
fi
apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && installed=1
if [ "$own_policy" = 1 ]; then
    for package in "${missing[@]}"; do # nor may they start at the next boot
        case $package in
        openssh-server) units="ssh ssh.socket" ;;
        slurm-wlm) units="slurmctld slurmd" ;;
        munge) units="munge" ;;
        *) units="" ;;
        esac
        for unit in $units; do systemctl disable --quiet "$unit" 2>/dev/null || true; done
    done
fi
if [ "$installed" = 1 ]; then
    [ -z "$stamp" ] || touch "$stamp"
else
    say "apt could not install them: \`onellm rehearse\` and its tests will not run."
fi
