#!/usr/bin/env bash
# Prove and measure on a GPU all that the project claims for one:
#     bash benchmarks/gpu.sh [--dry-run] [--results DIR] [STEP ...]
# STEP is doctor, tests, operator, backbone, train, inference or detector; none is all. --dry-run runs the same commands on
# the CPU at the smallest sizes, without compiling, and keeps no result. Needs torch, triton and timm; pytest for the tests,
# mmdet for the detector. PYTHON names another interpreter. A step that fails does not stop the others.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
results=$root/benchmarks/results
all=(doctor tests operator backbone train inference detector)
steps=() failed=() doctor=() tests=(-k 'contmix or dilated or triton') common=() small=() archs=(xt t)
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run)
        scratch=$(mktemp -d) && results=$scratch && trap 'rm -r "$scratch"' EXIT
        export TORCH_COMPILE_DISABLE=1 CUDA_VISIBLE_DEVICES=
        doctor=(--quick) tests=(-m 'not slow' -k 'test_triton and dense_attention') archs=(xt)
        common=(--device cpu --threads 1 --rounds 1 --turn-seconds 0)
        small=("${common[@]}" --arch xt --batch 2 --size 128x128)
        ;;
    --results) results=$(realpath -m "$2") && shift ;;
    *)
        if [[ " ${all[*]} " != *" $1 "* ]]; then
            echo "$0 knows the steps ${all[*]}, got $1" >&2
            exit 2
        fi
        steps+=("$1")
        ;;
    esac
    shift
done
cd "$root" || exit 1
if [ ${#small[@]} -eq 0 ] && ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "$0 needs a GPU that torch can use, and $python found none; PYTHON names another interpreter" >&2
    exit 1
fi

run() { # a command, for ten minutes at the most
    local start=$SECONDS
    echo "== $*"
    timeout 600 "$@" || failed+=("$*")
    echo "== $((SECONDS - start)) s"
}

has() {
    "$python" -c "import $1" 2>/dev/null || { echo "== $1 is not installed: left out" && return 1; }
}

network() { # PRESET OPTION...: against the published pipeline on an unfold, in bfloat16
    local presets=(benchmarks.presets:deploy benchmarks.presets:channels_last "benchmarks.presets:$1")
    [ ${#small[@]} -eq 0 ] || presets=("benchmarks.presets:$1" --beside convnext_tiny+compile)
    run "$python" benchmarks/network.py --dtype bf16 --rounds 5 --results "$results" "${@:2}" "${small[@]}" \
        --presets "${presets[@]}"
}

[ ${#steps[@]} -gt 0 ] || steps=("${all[@]}")
for step in "${steps[@]}"; do
    case $step in
    doctor) # the first line: on a machine without them it would ask for the operators of the CPU
        "$python" -m overlock.ops.build >/dev/null 2>&1
        run "$python" -m overlock doctor "${doctor[@]}"
        ;;
    tests) has pytest && run "$python" -m pytest tests/overlock/ops -q "${tests[@]}" ;;
    operator) # against the budget of two images at detection size
        run "$python" benchmarks/contmix.py --arch s --size 800x1344 --batch 2 --dtype bf16 --results "$results" \
            "${small[@]}" ${small:+--stage 4}
        ;;
    backbone) network compile_blocks --arch s --mode train --size 800x1344 --batch 2 ;; # the training step that counts
    train | inference) # images a second of classifiers
        modes=(compile_blocks --mode train)
        [ "$step" = train ] || modes=(cuda_graphs --mode forward)
        for arch in "${archs[@]}"; do
            network "${modes[@]}" --network classifier --size 224x224 --batch 128 --arch "$arch" \
                --beside convnext_tiny convnext_tiny+compile swin_tiny swin_tiny+compile
        done
        ;;
    detector)
        if [ -e benchmarks/detector.py ] && has mmdet; then
            for mode in test train; do
                run "$python" benchmarks/detector.py --mode "$mode" --batch 2 --results "$results" \
                    "${common[@]}" ${common:+--size 64x96}
            done
        fi
        ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
