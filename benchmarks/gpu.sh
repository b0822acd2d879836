#!/usr/bin/env bash
# Measure on a GPU everything that the project claims for one: bash benchmarks/gpu.sh [folder of the JSON].
# Needs torch with CUDA, triton and timm. PYTHON names another interpreter. A step that fails does not stop the rest.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=$(realpath -m "${1:-$root/benchmarks/results}")
python=${PYTHON:-python}
cd "$root" || exit 1
failed=()

step() {
    echo "== $*"
    "$@" || failed+=("$*")
}

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "$0 needs a GPU that torch can use, and $python found none; PYTHON names another interpreter" >&2
    exit 1
fi

if "$python" -c 'import pytest' 2>/dev/null; then
    step "$python" -m pytest tests/overlock -q -k 'contmix or triton or cuda'
fi
# The fused operator's kernels against the budget of two images at detection size.
step "$python" benchmarks/contmix.py --device cuda --arch s --size 800x1344 --batch 2 --dtype bf16 --results "$results"
# The training step that counts, against the published pipeline on an unfold.
step "$python" benchmarks/network.py --device cuda --arch s --mode train --size 800x1344 --batch 2 --dtype bf16 \
    --presets train benchmarks.presets:channels_last --beside --results "$results"
# Images a second, beside ConvNeXt-T and Swin-T.
step "$python" benchmarks/network.py --device cuda --arch t --size 224x224 --batch 128 --dtype bf16 \
    --presets deploy benchmarks.presets:channels_last --beside --results "$results"
# Compiling takes minutes, so it comes last.
step "$python" benchmarks/network.py --device cuda --arch t --size 224x224 --batch 128 --dtype bf16 \
    --presets compile --results "$results"
step "$python" benchmarks/network.py --device cuda --arch s --mode train --size 800x1344 --batch 2 --dtype bf16 \
    --presets compile --results "$results"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
