#!/usr/bin/env bash
# Everything that waits for a GPU, in two parts of at most ten minutes each, in order of worth. From anywhere:
#   results/speed/on_a_gpu.sh 1    the tests that need a GPU; the same bits twice, resumed and replayed; steps per second
#   results/speed/on_a_gpu.sh 2    GDFQ and ACQ on CIFAR-10 with the authors' 80,000 steps, as far as the time goes; again: goes on
# What they print lands in results/speed/on_a_gpu/, a line for each step in summary.txt, steps per second in results/speed/DEVICE.json.
# LIST=1 only says what would be run. DRY=1 runs it on the CPU, in small and into a temporary folder: it shows that the script works, nothing else.
set -uo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin}
device=cuda out=results/speed/on_a_gpu graphs=--graphs speeds=auto
measured=(--methods gdfq,acq --precisions fp32,tf32,bf16 --rounds 3 --seconds 2)
teacher='"pytorchcv:resnet20_cifar10"' images=cifar10 budget="{epochs: 400, iterations: 200, batch_size: 200}"
if [ -n "${DRY:-}" ]; then
    device=cpu out=$(mktemp -d) graphs='' speeds=$out/speed.json
    measured=(--methods gdfq --precisions fp32 --rounds 1 --seconds 0 --batch-size 2)
    teacher='{model: cifar:resnet20, weights: results/reference/digits/digits-resnet20.safetensors}' images=digits
    budget="{epochs: 5, iterations: 2, batch_size: 4}"
fi

step() { # SECONDS NAME COMMAND...: what it prints into NAME.txt, how it ended into summary.txt
    local limit=$1 name=$2 began=$SECONDS code
    shift 2
    if [ -n "${LIST:-}" ]; then echo "$limit s: $name: $*"; return; fi
    timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    case $code in
        0) said=done ;;
        124 | 137 | 143) said="out of time" ;;
        *) said="failed with $code" ;;
    esac
    echo "$name: $said after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
}

case ${1:-} in
    1 | 2) ;;
    *) sed -n '2,6s/^# //p' "$0"; exit 2 ;;
esac
if [ -n "${LIST:-}" ]; then out=$(mktemp -d); fi
mkdir -p "$out"
case $1 in
    1)
        step 20 environment bash -c 'nvidia-smi; "$0/python" -c "import json, sys, torch; from dfqbench.store.provenance import provenance
print(json.dumps(provenance(torch.device(sys.argv[1])), indent=1))" "$1"' "$BIN" "$device"
        step 100 graphs "$BIN/pytest" -rs tests/engine/test_step_graph.py -k cuda
        step 200 same-bits "$BIN/pytest" -rs tests/methods/test_on_a_gpu.py -k real_gpu
        step 280 speed "$BIN/dfqbench" speed --device "$device" "${measured[@]}" --out "$speeds"
        ;;
    2)
        cat > "$out/sweep.yaml" <<SWEEP
name: on-a-gpu
teachers: [$teacher]
evaluate: $images
methods: [gdfq, acq]
bits: [w4a4]
budget: $budget
SWEEP
        step 540 cells "$BIN/dfqbench" run "$out/sweep.yaml" --results "$out/cells" --device "$device" $graphs --checkpoint-every 60
        step 20 table "$BIN/dfqbench" table "$out/sweep.yaml" --results "$out/cells"
        ;;
esac
