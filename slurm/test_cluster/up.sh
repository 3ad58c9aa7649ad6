#!/usr/bin/env bash
# Brings up a real one-node Slurm (slurmctld, slurmd, two fake GPUs) in a folder of its own, on free ports, beside whatever else runs.
#
#   slurm/test_cluster/up.sh FOLDER [--accounting] [--array-size N]
#   export SLURM_CONF=FOLDER/slurm.conf           then sinfo, sbatch, dfqbench submit ... speak to it
#   slurm/test_cluster/down.sh FOLDER
#
# Jobs of its partition `urgent` pre-empt those of `main`. --accounting adds slurmdbd on a MariaDB of its own, so that sacct answers. --array-size sets MaxArraySize.
# Root is needed (device nodes for the fake GPUs, jobs in other users' names). Nothing in it is safe on an open network: AuthType=auth/none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage() { echo "usage: up.sh FOLDER [--accounting] [--array-size N]" >&2; exit 2; }
fail() { echo "up.sh: $*" >&2; exit 2; }

accounting= array_size=1001 folder=
while [ $# -gt 0 ]; do
    case $1 in
    --accounting) accounting=yes ;;
    --array-size) [[ ${2:-} =~ ^[0-9]+$ ]] || usage; array_size=$2; shift ;;
    -*) usage ;;
    *) [ -z "$folder" ] || usage; folder=$1 ;;
    esac
    shift
done
[ -n "$folder" ] || usage
[ "$(id -u)" = 0 ] || fail "root is needed"
for program in slurmctld slurmd sbatch ${accounting:+slurmdbd mariadbd mariadb-install-db}; do
    command -v "$program" >/dev/null || fail "$program is not installed: run install.sh"
done
[ ! -e "$folder/slurm.conf" ] || fail "$folder has a cluster already: run down.sh first"
mkdir -p "$folder"/{state,spool,log}
folder=$(cd "$folder" && pwd)
trap 'status=$?; [ $status = 0 ] || "$here/down.sh" "$folder" >/dev/null 2>&1' EXIT

host=$(hostname -s)
read -r ctld_port slurmd_port dbd_port sql_port < <(python3 -c '
import socket
found = [socket.socket() for _ in range(4)]
for s in found: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in found))')

mknod "$folder/gpu0" c 1 3 2>/dev/null && mknod "$folder/gpu1" c 1 3 || fail "device nodes cannot be made here (a container without CAP_MKNOD?)"
echo "NodeName=$host Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"
echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"
cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
MaxArraySize=$array_size
KillWait=5
MinJobAge=300
SlurmdTimeout=60
GresTypes=gpu
${accounting:+AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$dbd_port}
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF
END
export SLURM_CONF=$folder/slurm.conf

await() { # what, seconds, command...
    local what=$1 seconds=$2
    shift 2
    for ((i = 0; i < seconds * 10; i++)); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "$what did not come up within $seconds s: see $folder/log"
}

if [ "$accounting" ]; then
    mariadb-install-db --no-defaults --user=root --datadir="$folder/mysql" --skip-test-db --auth-root-authentication-method=socket >"$folder/log/mariadb.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$folder/mysql" --socket="$folder/mysql.sock" --pid-file="$folder/mariadb.pid" \
        --bind-address=127.0.0.1 --port=$sql_port --innodb-buffer-pool-size=64M >>"$folder/log/mariadb.log" 2>&1 &
    await MariaDB 60 mariadb --no-defaults --socket="$folder/mysql.sock" -e 'select 1'
    mariadb --no-defaults --socket="$folder/mysql.sock" -e "create user slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm.* to slurm@'127.0.0.1'; create database slurm;"
    (umask 077 && cat >"$folder/slurmdbd.conf" <<END
AuthType=auth/none
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$dbd_port
SlurmUser=root
PidFile=$folder/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$sql_port
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
END
    )
    slurmdbd
    await slurmdbd 60 sacctmgr -n show cluster
    sacctmgr -i add cluster test >/dev/null 2>&1 || true
fi
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N "$host"
await "the node" 60 sh -c 'test "$(sinfo -h -o %t)" = idle'
echo "export SLURM_CONF=$SLURM_CONF"
