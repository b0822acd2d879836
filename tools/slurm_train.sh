#!/usr/bin/env bash
# Train as a Slurm job, one task for each GPU. The job goes on by itself in the queue after its time limit or a
# preemption; inside a job (sbatch, salloc) the tasks start at once.
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the limit the tasks save and end.
#SBATCH --signal=USR1@120
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py];" \
        "environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SBATCH_ARGS, SRUN_ARGS, MASTER_PORT, PYTHON" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3 work_dir=$4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# Slurm runs a copy of this script from a folder of its own.
export OVERLOCK_TOOLS=${OVERLOCK_TOOLS:-$(cd "$(dirname "$0")" && pwd)}

if [ -z "${SLURM_JOB_ID:-}" ]; then
    # SBATCH_ARGS holds several words.
    # shellcheck disable=SC2086
    exec sbatch --partition "$partition" --job-name "$job_name" \
        --gres "gpu:$gpus_per_node" --ntasks "$gpus" --ntasks-per-node "$gpus_per_node" \
        --cpus-per-task "${CPUS_PER_TASK:-5}" ${SBATCH_ARGS:-} "$0" "$@"
fi
shift 4
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$work_dir/last_checkpoint" ]; then
    set -- "$@" --resume
fi

# What cancels or preempts a job sends SIGTERM to this shell as well, and Slurm itself requeues a preempted job.
ended=
trap 'ended=1' TERM
status=0
# shellcheck disable=SC2086
srun --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$OVERLOCK_TOOLS/train.py" "$config" --work-dir "$work_dir" --launcher slurm "$@" ||
    status=$?
# 138: SIGUSR1 before the training listened.
if { [ "$status" = 143 ] || [ "$status" = 138 ]; } && [ -z "$ended" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
