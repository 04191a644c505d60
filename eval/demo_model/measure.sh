#!/usr/bin/env bash
# Quantize the bundled model by every recipe that is measured, compare all with it, write the tables and draw the charts.
# The environment's `neoquant` and `python` are used: run it as `PATH=.venv/bin:$PATH eval/demo_model/measure.sh`.
set -euo pipefail
cd "$(dirname "$0")/../.."

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
candidates=()

quantized() { # name, options
    neoquant quantize neoquant-demo "${@:2}" --out "$made/neoquant-demo-$1"
    candidates+=("$made/neoquant-demo-$1")
}
calibrated() { # the same by GPTQ, on text that the suite does not hold
    quantized "$@" --calibration demo --rows 64
}

for recipe in int8 nf4-single nf4 fp4 mixed nf4-edges; do
    quantized "$recipe" --recipe "$recipe"
done
calibrated nf4-gptq --bits 4 --type nf4
quantized affine4-g64 --bits 4 --type affine --group-size 64
quantized hqq4-g64 --bits 4 --type hqq --group-size 64
calibrated gptq4-g64 --bits 4 --type gptq --group-size 64
quantized mxfp4 --recipe mxfp4
calibrated mxfp4-gptq --bits 4 --type mxfp4
quantized affine3-g64 --bits 3 --type affine --group-size 64
quantized hqq3-g64 --bits 3 --type hqq --group-size 64
calibrated gptq3-g64 --bits 3 --type gptq --group-size 64
calibrated gptq2-g32 --bits 2 --type gptq --group-size 32

neoquant compare neoquant-demo "${candidates[@]}" --suite demo --json eval/results/demo.json
neoquant inspect "$made/neoquant-demo-nf4" --base neoquant-demo --suite demo --sensitivity --json eval/results/demo-layers.json
python eval/tables.py
python eval/charts.py
