#!/usr/bin/env bash
# A GPT of the SSDTrain paper's shapes (hidden x layers: 8192 x 4, 12288 x 3, 16384 x 2; batch 16, sequence 1024, TP 2).
# Needs two GPUs and a Megatron-LM checkout at core_v0.16.1:
#   MEGATRON_LM=~/Megatron-LM SPILL=/mnt/nvme/{local_rank} HIDDEN=12288 LAYERS=3 recipes/megatron/gpt.sh [more options]
# Real text: DATA="--data-path my_text_document --tokenizer-type ..."; the default is Megatron's mock data.
set -euo pipefail

: "${MEGATRON_LM:?Expected MEGATRON_LM, a Megatron-LM checkout, got nothing}"
: "${SPILL:?Expected SPILL, a directory on a fast local drive, got nothing}"
HIDDEN=${HIDDEN:-8192}
LAYERS=${LAYERS:-4}
BATCH=${BATCH:-16}
DATA=${DATA:---mock-data --tokenizer-type NullTokenizer --vocab-size 50256}
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
    --num-layers "$LAYERS"
    --seq-length 1024
    --hidden-size "$HIDDEN"
    --num-attention-heads "$((HIDDEN / 128))"
    --max-position-embeddings 1024
    --transformer-impl local
    --tensor-model-parallel-size 2
)
TRAINING=(
    --micro-batch-size "$BATCH"
    --global-batch-size "$BATCH"
    --train-iters 20
    --lr 1e-4
    --optimizer sgd
    --fp16
    --no-bias-gelu-fusion
    --no-gradient-accumulation-fusion
    --no-persist-layer-norm
    --log-interval 1
    --eval-iters 0
)
OFFLOAD=(
    --ssdtrain-dir "$SPILL"
    --ssdtrain-mode auto
    --ssdtrain-min-nbytes 16MiB
    --ssdtrain-staging-nbytes 2GiB
    --ssdtrain-prefetch-nbytes 2GiB
)

# shellcheck disable=SC2086  # DATA is several options
exec "${TORCHRUN:-torchrun}" --nproc-per-node 2 "$(dirname "$0")/run.py" "$MEGATRON_LM/pretrain_gpt.py" \
    "${MODEL[@]}" "${TRAINING[@]}" "${OFFLOAD[@]}" $DATA "$@"
