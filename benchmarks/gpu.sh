#!/usr/bin/env bash
# All that is measured on a GPU, in one command; the results are written to benchmarks/results/*-cuda.json.
#
#   pip install -e . transformers && bash benchmarks/gpu.sh [--official FOLDER]
#   bash benchmarks/gpu.sh --tiny          (a dry run of two minutes, on any machine)
#
# What is looked for (ViT-L/16, 224 pixels, 75 % masked, bf16): `share` of "unmask compiled" at least 0.55, and a ratio
# of at least 1.5 for "unmask compiled over transformers compiled". Not yet measured on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/step.py --recipes mae_large mae_base mae_huge --precisions bf16 --compiled "$@"
case " $* " in *" --tiny "*) python benchmarks/attention.py --tiny ;; *) python benchmarks/attention.py ;; esac
