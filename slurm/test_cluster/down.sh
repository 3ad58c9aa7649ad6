#!/usr/bin/env bash
# Takes down the cluster that up.sh brought up in FOLDER: its jobs, its daemons, its fake GPUs; the logs in FOLDER/log stay.
set -euo pipefail
[ $# = 1 ] || { echo "usage: down.sh FOLDER" >&2; exit 2; }
[ -e "$1/slurm.conf" ] || { echo "down.sh: no cluster in $1" >&2; exit 2; }
folder=$(cd "$1" && pwd)
export SLURM_CONF=$folder/slurm.conf

end() { # pid file, signal, seconds: ends the process that the file names
    local pid
    pid=$(cat "$folder/$1" 2>/dev/null) || return 0
    kill "-$2" "$pid" 2>/dev/null || return 0
    for ((i = 0; i < $3 * 10; i++)); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

if kill -0 "$(cat "$folder/slurmctld.pid" 2>/dev/null)" 2>/dev/null; then
    timeout 10 scancel --user=root 2>/dev/null || true
    timeout 10 scancel --user=root --signal=KILL 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
        [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
        sleep 0.1
    done
fi
end slurmd.pid TERM 10
end slurmctld.pid TERM 10
end slurmdbd.pid TERM 10
end mariadb.pid TERM 20
rm -rf "$folder"/{state,spool,mysql} "$folder"/{gpu0,gpu1,slurm.conf,gres.conf,cgroup.conf,slurmdbd.conf,mysql.sock}
