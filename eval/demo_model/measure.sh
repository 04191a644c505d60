#!/usr/bin/env bash
# Quantize the bundled model by every recipe that is measured, compare all with it, and write the tables.
# The environment's `neoquant` and `python` are used: run it as `PATH=.venv/bin:$PATH eval/demo_model/measure.sh`.
set -euo pipefail
cd "$(dirname "$0")/../.."

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
candidates=()
for recipe in int8 nf4-single nf4 fp4 mixed nf4-edges; do
    neoquant quantize neoquant-demo --recipe "$recipe" --out "$made/neoquant-demo-$recipe"
    candidates+=("$made/neoquant-demo-$recipe")
done
neoquant compare neoquant-demo "${candidates[@]}" --suite demo --json eval/results/demo.json
python eval/tables.py
