#!/usr/bin/env bash
# Train on several GPUs of one or more machines; without GPUs, GPUS counts CPU processes.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [options of train.py];" \
        "environment: NNODES, NODE_RANK, MASTER_ADDR, PORT, PYTHON" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2

"${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@" &
launcher=$!

# torchrun passes SIGTERM and SIGINT on to its processes, knows no SIGUSR1, and ends with 1 after each of them.
stopped=
trap 'stopped=143; kill -TERM "$launcher"' TERM USR1
# A terminal sends its Ctrl-C to torchrun, too.
trap 'stopped=130' INT
status=0
wait "$launcher" || status=$?
# A signal ends the first wait; the processes save meanwhile.
if [ -n "$stopped" ]; then
    while kill -0 "$launcher" 2> /dev/null; do
        wait "$launcher" || true
    done
    exit "$stopped"
fi
exit "$status"
