#!/usr/bin/env bash
# Quantize the bundled model to two and three bits by GPTQ for the model's loss, and on a trellis, and compare with it on what
# measure.sh compares on. The environment's `neoquant` and `python` are used: `PATH=.venv/bin:$PATH eval/demo_model/measure_objectives.sh`.
set -euo pipefail
cd "$(dirname "$0")/../.."

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

calibrated() { # name, options
    neoquant quantize neoquant-demo "${@:2}" --calibration demo --rows 64 --length 512 --out "$made/$1"
    neoquant compare neoquant-demo "$made/$1" --suite demo --json "$made/$1.json"
    compared+=("$made/$1.json")
}

compared=()
calibrated trellis2-model --bits 2 --type trellis --quantizer gptq --objective model --correction 0.5
calibrated trellis2 --recipe trellis2
calibrated gptq2-g32-model --bits 2 --type gptq --group-size 32 --objective model --correction 0.5
calibrated trellis2-corrected --bits 2 --type trellis --quantizer gptq --correction 0.5

python eval/quality/across_grids.py "${compared[@]}" --of trellis2-model --json eval/results/by-loss-demo.json

compared=()
calibrated trellis3-model --bits 3 --type trellis --quantizer gptq --objective model --correction 0.5
calibrated gptq3-g64-model --bits 3 --type gptq --group-size 64 --objective model --correction 0.5
calibrated trellis3 --bits 3 --type trellis --quantizer gptq

python eval/quality/across_grids.py "${compared[@]}" --of trellis3-model --json eval/results/trellis3-demo.json
