#!/usr/bin/env bash
# ViT-T (192 wide, 12 deep, patch 2) on CIFAR-10, pre-trained for 2000 epochs and fine-tuned for 100, beside the same from
# scratch; the public figures of this set-up are 74.1 % from scratch and 89.8 % pre-trained (IcarusWizard/MAE).
#
#   bash benchmarks/cifar10.sh TRAIN TEST [EPOCHS]     TRAIN, TEST: folders with a sub-folder for each class
#
# Wants a GPU: on two cores an epoch takes about half an hour. Can be stopped and run again: what is there is resumed.
set -euo pipefail
train=$1 test=$2 epochs=${3:-2000} runs=${RUNS:-runs}

go() {  # go NAME COMMAND...: the run NAME, resumed when it was begun
  local out="$runs/$1"; shift
  if [ -e "$out/plan.json" ]; then unmask resume "$out"; else "$@" --out "$out"; fi
}

go cifar10-vit-t unmask pretrain "$train" --recipe mae_nano \
  --set method.encoder.depth=12 --set method.encoder.patch=2 \
  --set method.decoder.width=192 --set method.decoder.depth=4 --set method.decoder.heads=3 \
  --set train.epochs="$epochs" --set train.batch_size=4096 --set optim.base_lr=1.5e-4 --set optim.warmup=0.1
go cifar10-vit-t-fine-tuned unmask finetune "$runs/cifar10-vit-t" "$train" --test "$test" --recipe finetune_nano
go cifar10-vit-t-from-scratch unmask finetune "$runs/cifar10-vit-t" "$train" --test "$test" --from-scratch
