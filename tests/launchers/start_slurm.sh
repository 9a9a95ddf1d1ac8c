#!/bin/bash
# A Slurm of one node for tests: munged, slurmctld and slurmd in a process namespace of their own.
#
#   start_slurm.sh FOLDER
#
# Writes FOLDER/slurm.conf (for SLURM_CONF), prints "ready" once the node is idle, and runs until its standard input
# ends; every process of the cluster and of its jobs ends with it. All state is in FOLDER. Needs root, for the
# namespace, without which `ray symmetric-run` would see every Ray of the machine and stop it at its end.
#
# Debian's slurm-wlm and munge must be installed; with RLHF_RAY_INSTALL_SLURM=1 it installs them.
set -o errexit -o nounset -o pipefail

folder=$1
export PATH=$PATH:/usr/sbin:/sbin

# Not the shell's $$ or BASHPID: only the first process of a namespace has number 1.
if [[ ${2:-} != inside ]]; then
    missing() { ! { command -v slurmctld && command -v slurmd && command -v munged; } > /dev/null; }
    if missing && [[ ${RLHF_RAY_INSTALL_SLURM:-} == 1 ]]; then
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge >&2
    fi
    if missing; then
        echo "slurmctld, slurmd or munged is not installed" >&2
        exit 1
    fi
    exec unshare --pid --fork --mount-proc --kill-child -- bash "$0" "$folder" inside
fi

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

node=$(hostname -s)
user=$(id -un)
cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired: 120 s without this, and 5 are the least.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
KillWait=5
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$folder/state" "$folder/spool"
export SLURM_CONF=$folder/slurm.conf

head --bytes=1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
# --force: a folder below /tmp is not where munged likes to have its socket.
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
slurmctld -c
slurmd -c

for _ in {1..60}; do
    if [[ $(sinfo --noheader --format=%T 2> /dev/null) == idle ]]; then
        echo ready
        cat > /dev/null
        exit
    fi
    sleep 0.5
done
echo "the node did not become idle: $(sinfo 2>&1); $(tail -n 5 "$folder/slurmctld.log" "$folder/slurmd.log")" >&2
exit 1
