#!/usr/bin/env bash
# A T5 (decoder: half the layers) of the SSDTrain paper's shapes (hidden x layers: 8192 x 4, 12288 x 3, 16384 x 2; batch 16, sequence 1024, TP 2).
# Needs two GPUs and a Megatron-LM checkout at core_v0.16.1:
#   MEGATRON_LM=~/Megatron-LM SPILL=/mnt/nvme/{local_rank} HIDDEN=12288 LAYERS=3 recipes/megatron/t5.sh [more options]
# DATA names real text, prepared with Megatron-LM's tools/preprocess_data.py, and its vocabulary; there is no mock data here:
#   DATA="--data-path my_text_sentence --vocab-file bert-vocab.txt --tokenizer-type BertWordPieceLowerCase"
set -euo pipefail

: "${MEGATRON_LM:?Expected MEGATRON_LM, a Megatron-LM checkout, got nothing}"
: "${SPILL:?Expected SPILL, a directory on a fast local drive, got nothing}"
: "${DATA:?Expected DATA, options that name a text and its vocabulary, got nothing}"
HIDDEN=${HIDDEN:-8192}
LAYERS=${LAYERS:-4}
BATCH=${BATCH:-16}
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
    --encoder-num-layers "$LAYERS"
    --decoder-num-layers "$((LAYERS / 2))"
    --encoder-seq-length 1024
    --decoder-seq-length 1024
    --vocab-extra-ids 100
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
exec "${TORCHRUN:-torchrun}" --nproc-per-node 2 "$(dirname "$0")/run.py" "$MEGATRON_LM/pretrain_t5.py" \
    "${MODEL[@]}" "${TRAINING[@]}" "${OFFLOAD[@]}" $DATA "$@"
