# What every job of `rlhf-ray launch slurm` does: `ray symmetric-run` on all nodes, the program on the first, a requeue
# where asked. The launcher writes the lines before this: options of sbatch, and the variables command, srun_options,
# ray_options, log_dir and requeue (empty: no requeue).

# The batch script runs on the first node, which becomes Ray's head.
head_ip=127.0.0.1
if ((SLURM_JOB_NUM_NODES > 1)); then
    head_ip=$(getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR == 1 { print $1 }' || true)
    # Some distributions map a machine's own name to a loopback address.
    if [[ -z $head_ip || $head_ip == 127.* ]]; then
        head_ip=$(hostname -I | awk '{ print $1 }')
    fi
fi
export RAY_ADDRESS=$head_ip:$((20000 + SLURM_JOB_ID % 10000))
# All users of these machines can reach Ray's ports: this job's token is what protects it. Ray's own rule, a token where
# the home folder holds one, is not that of its clients, which would be refused.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token ]]; then
    RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
    export RAY_AUTH_TOKEN
fi
# Nodes of a large job come up minutes apart.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
export PYTHONUNBUFFERED=1
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}

# Where Slurm does not track processes by cgroups, the Ray of a start that was killed lives on, and no other one can
# start. Only processes with another count than this start's are of an earlier one.
if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        for process in /proc/[0-9]*; do
            if grep -zqx "SLURM_JOB_ID=$SLURM_JOB_ID" "$process/environ" &&
                ! grep -zqx "SLURM_RESTART_COUNT=$SLURM_RESTART_COUNT" "$process/environ"; then
                kill -KILL "${process#/proc/}"
            fi
        done 2> /dev/null
        true'
fi

# Slurm's TERM would take Ray away from under the program; this one reaches the program alone.
pid_file=$log_dir/.$SLURM_JOB_ID.pid
stopping=
stop() {
    stopping=yes
    if [[ -s $pid_file ]]; then
        kill -TERM "$(< "$pid_file")" || true
    else
        kill -TERM "$step" || true
    fi
}
rm -f "$pid_file"
trap 'rm -f "$pid_file"' EXIT

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 "${srun_options[@]}" \
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$cpus" "${ray_options[@]}" \
    -- bash -c 'echo $$ > "$0" && exec "$@"' "$pid_file" "${command[@]}" &
step=$!
trap stop TERM
# A signal ends wait before the step has ended.
while true; do
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2> /dev/null || break
done
if ((status == 0)) && [[ ! -e $pid_file ]]; then
    echo "Ray did not start: the program has not run" >&2
    status=1
fi

# A job that is being cancelled gets TERM too; it is no longer RUNNING then.
if [[ -n $requeue && -n $stopping ]] && ((status != 0)) &&
    [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    echo "asked to stop before the end: queueing again to resume from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
