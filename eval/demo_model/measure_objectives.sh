#!/usr/bin/env bash
# Quantize the bundled model by GPTQ for the model's loss, and on a trellis, and compare with it on what measure.sh compares on.
# The environment's `neoquant` and `python` are used: run it as `PATH=.venv/bin:$PATH eval/demo_model/measure_objectives.sh`.
set -euo pipefail
cd "$(dirname "$0")/../.."

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
candidates=()

calibrated() { # name, options
    neoquant quantize neoquant-demo "${@:2}" --calibration demo --rows 64 --length 512 --out "$made/$1"
    candidates+=("$made/$1")
}
by_loss=(--objective model --correction 0.5)

calibrated trellis2 --recipe trellis2
calibrated trellis2-model --bits 2 --type trellis --quantizer gptq "${by_loss[@]}"
calibrated gptq2-g32-model --bits 2 --type gptq --group-size 32 "${by_loss[@]}"
calibrated gptq3-g64-model --bits 3 --type gptq --group-size 64 "${by_loss[@]}"
calibrated gptq4-g64-model --bits 4 --type gptq --group-size 64 "${by_loss[@]}"
calibrated nf4-gptq-model --bits 4 --type nf4 "${by_loss[@]}"
calibrated trellis2-corrected --bits 2 --type trellis --quantizer gptq --correction 0.5

neoquant compare neoquant-demo "${candidates[@]}" --suite demo --json "$made/compared.json"
python eval/quality/across_grids.py "$made/compared.json" --of trellis2-model --json eval/results/by-loss-demo.json
