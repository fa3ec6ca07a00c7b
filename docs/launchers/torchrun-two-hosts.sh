#!/usr/bin/env bash
# Pre-train on two hosts of 8 GPUs with torchrun. Start it on both hosts, with the number of the host:
#   bash torchrun-two-hosts.sh 0 --recipe mae_base     on the host node0
#   bash torchrun-two-hosts.sh 1 --recipe mae_base     on the other host
# DATA and RUN are on a disk that both hosts share. Started again, the same commands continue the run.
set -euo pipefail

NUMBER=$1
shift
exec torchrun --nnodes 2 --node-rank "$NUMBER" --nproc-per-node "${GPUS:-8}" \
  --master-addr "${HOST:-node0}" --master-port "${PORT:-29500}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
  -m unmask pretrain "$DATA" --out "$RUN" --resume auto "$@"
