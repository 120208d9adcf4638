"""One transformer block on one GPU: bytes it saves for backward, floating-point operations, parameters.

Activation bytes follow Korthikanti et al. 2022, table 2 and section 4: with s tokens, micro-batch b, width h, a heads
and tensor parallel size t, in 16 bit with dropout, `sbh(10 + 24/t + 5as/(ht))`; with sequence parallel all of it is
divided by t. FlashAttention keeps one number per token and head (32 bit) instead of the scores.
"""

from __future__ import annotations

from ssdtrain.tools.estimate.shape import Shape

_STATISTIC_NBYTES = 4


def layer_nbytes(shape: Shape, *, is_decoder: bool = False) -> float:
    """Bytes one block saves for one micro-batch. `is_decoder`: of a T5, with cross-attention."""
    whole, split = _elements(shape, is_decoder=is_decoder)
    tokens = shape.sequence * shape.batch
    attentions = 2 if is_decoder else 1
    if shape.is_sequence_parallel:
        whole, split = 0.0, whole + split
    scores = attentions * _score_nbytes(shape)
    return tokens * (whole + split / shape.tp) + scores / shape.tp


def _elements(shape: Shape, *, is_decoder: bool) -> tuple[float, float]:
    """Bytes per token: what every GPU of a tensor parallel group has whole, and what they share."""
    e, h, f, kv = shape.element_nbytes, shape.hidden, shape.ffn_width, shape.kv_width
    mask = 1 if shape.has_dropout and shape.kind != "llama" else 0
    attention_whole, attention_split = e * h + mask * h, e * (h + 2 * kv) + e * h  # input; Q, K, V; what is projected
    norm = e * h
    if shape.kind == "llama":
        return 2 * norm + attention_whole + e * h, attention_split + 4 * e * f  # gate, its SiLU, up, their product
    mlp_whole, mlp_split = e * h + mask * h, 2 * e * f
    attentions, norms = (2, 3) if is_decoder else (1, 2)
    whole = norms * norm + attentions * attention_whole + mlp_whole
    return whole, attentions * attention_split + mlp_split


def _score_nbytes(shape: Shape) -> float:
    s, b, a = shape.sequence, shape.batch, shape.heads
    if shape.has_flash:
        return _STATISTIC_NBYTES * a * s * b
    mask = 1 if shape.has_dropout and shape.kind != "llama" else 0
    outputs = 2 if mask else 1  # of the softmax, and of the dropout
    return (outputs * shape.element_nbytes + mask) * a * s * s * b


def layer_flops(shape: Shape, *, is_decoder: bool = False) -> float:
    """Operations of one block's forward for one micro-batch, on all GPUs of a tensor parallel group together."""
    s, b, h = shape.sequence, shape.batch, shape.hidden
    attentions = 2 if is_decoder else 1
    return 2.0 * s * b * layer_parameters(shape, is_decoder=is_decoder) + attentions * 4.0 * s * s * b * h


def layer_parameters(shape: Shape, *, is_decoder: bool = False) -> int:
    """Weights of one block's matrices."""
    h, f = shape.hidden, shape.ffn_width
    attention = 2 * h * h + 2 * h * shape.kv_width
    mlp = (3 if shape.kind == "llama" else 2) * h * f
    return (2 if is_decoder else 1) * attention + mlp
