#!/usr/bin/env bash
# Installs what up.sh needs on Debian or Ubuntu: Slurm, and MariaDB with slurmdbd for accounting. Starts nothing.
set -euo pipefail
missing=
for program in slurmctld slurmd slurmdbd sbatch mariadbd mariadb-install-db; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "install.sh: root is needed to install packages" >&2; exit 2; }
command -v apt-get >/dev/null || { echo "install.sh: apt-get is not here; install slurmctld, slurmd, slurmdbd and MariaDB by hand" >&2; exit 2; }
export DEBIAN_FRONTEND=noninteractive
[ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit)" ] || apt-get update -qq
# the packages' own services must not start: up.sh brings up daemons of its own, in a folder of its own
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends slurm-wlm slurmdbd mariadb-server >/dev/null
