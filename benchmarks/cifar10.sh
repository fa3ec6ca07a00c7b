#!/usr/bin/env bash
# Pre-train ViT-T (192 wide, 12 deep, patch 2) on CIFAR-10 for 2000 epochs, fine-tune it for 100, and train the same
# network from scratch. Published results of this set-up: 74.1 % from scratch, 89.8 % pre-trained (IcarusWizard/MAE).
#
#   bash benchmarks/cifar10.sh TRAIN TEST [EPOCHS]     TRAIN, TEST: folders with a sub-folder for each class
#
# Needs a GPU: on two cores, an epoch takes about half an hour. Can be stopped; the same command resumes the runs.
set -euo pipefail
train=$1 test=$2 epochs=${3:-2000} runs=${RUNS:-runs}

go() {  # go NAME COMMAND...: train the run NAME, or resume it if it exists
  local out="$runs/$1"; shift
  if [ -e "$out/plan.json" ]; then unmask resume "$out"; else "$@" --out "$out"; fi
}

go cifar10-vit-t unmask pretrain "$train" --recipe mae_nano \
  --set method.encoder.depth=12 --set method.encoder.patch=2 \
  --set method.decoder.width=192 --set method.decoder.depth=4 --set method.decoder.heads=3 \
  --set train.epochs="$epochs" --set train.batch_size=4096 --set optim.base_lr=1.5e-4 --set optim.warmup=0.1
go cifar10-vit-t-fine-tuned unmask finetune "$runs/cifar10-vit-t" "$train" --test "$test" --recipe finetune_nano
go cifar10-vit-t-from-scratch unmask finetune "$runs/cifar10-vit-t" "$train" --test "$test" --from-scratch
