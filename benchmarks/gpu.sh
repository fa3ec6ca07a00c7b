#!/usr/bin/env bash
# Run all GPU benchmarks; the results are written to benchmarks/results/*-cuda.json.
#
#   pip install -c constraints.txt -e . transformers && bash benchmarks/gpu.sh [--official FOLDER]
#   bash benchmarks/gpu.sh --tiny          (a dry run of a minute, on any machine, which writes nothing)
#
# Targets (ViT-L/16, 224 pixels, 75 % masked, bf16): `share` of "unmask compiled" at least 0.55, and a ratio
# of at least 1.5 for "unmask compiled over transformers compiled". Not yet measured on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" --tiny "*) run=--tiny ;; *) run=--keep ;; esac
python benchmarks/step.py --recipes mae_large mae_base mae_huge --precisions bf16 --compiled "$run" "$@"
python benchmarks/attention.py "$run"
