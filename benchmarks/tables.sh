#!/usr/bin/env bash
# Reproduce the paper's tables on labelled images, on a CPU or GPU. Run it again to continue a stopped one.
#
#   bash benchmarks/tables.sh TRAIN TEST [TIME_PER_TABLE] [RECIPE] [SEEDS]
#   bash benchmarks/tables.sh data/cifar10/train data/cifar10/test 1h                 (as in docs/LOG.md)
#   bash benchmarks/tables.sh data/cifar10/train data/cifar10/test 3h mae_tiny 3      (with a GPU: hundreds of epochs)
set -euo pipefail
train=$1 test=$2 time=${3:-1h} recipe=${4:-mae_nano} seeds=${5:-1}
out=runs/tables-$(basename "$(dirname "$train")")-$recipe
[ -e "$out/tokenizer/status.json" ] || unmask pretrain "$train" --recipe dvae_nano --budget 15m --out "$out/tokenizer"
for table in fig5 1c 1f 1e 1a 1b fig7; do
    unmask ablate "$table" "$train" --test "$test" --budget "$time" --recipe "$recipe" --seeds "$seeds" --out "$out/$table"
done
unmask ablate 1d "$train" --test "$test" --budget "$time" --recipe "$recipe" --seeds "$seeds" --out "$out/1d" \
    --tokenizer "$out/tokenizer"
unmask ablate family "$train" --test "$test" --budget "$time" --seeds "$seeds" --out "$out/family" \
    --tokenizer "$out/tokenizer"
