"""Operators that only CUDA has, written with those the CPU has too. By their names, overload included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

OWN: dict[str, Callable[..., Any]] = {}
aten = torch.ops.aten


def _own(name: str, *, is_random: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        function.is_random = is_random  # type: ignore[attr-defined]
        OWN[name] = function
        return function

    return register


# -- dropout -------------------------------------------------------------------------------------------------------


@_own("native_dropout", is_random=True)
def _native_dropout(x: torch.Tensor, p: float, train: bool | None, *, generator: torch.Generator | None = None) -> Any:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = torch.empty_like(x, dtype=torch.float32).uniform_(generator=generator) >= p
    return x * kept * (0.0 if p == 1 else 1 / (1 - p)), kept


@_own("_fused_dropout", is_random=True)
def _fused_dropout(x: torch.Tensor, p: float, generator: torch.Generator | None = None) -> Any:
    """`p` is the probability to keep."""
    result, kept = _native_dropout(x, 1 - p, True, generator=generator)
    return result, kept.to(torch.uint8)


@_own("_masked_scale")
def _masked_scale(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return x * mask * scale


# -- softmax with a result of another dtype --------------------------------------------------------------------------


@_own("_softmax")
def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return aten._softmax(x.float() if half_to_float else x, dim, False)


@_own("_log_softmax")
def _log_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return aten._log_softmax(x.float() if half_to_float else x, dim, False)


@_own("_softmax_backward_data")
def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype) -> torch.Tensor:
    return aten._softmax_backward_data(grad, output, dim, grad.dtype).to(input_dtype)


@_own("_log_softmax_backward_data")
def _log_softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype) -> torch.Tensor:
    return aten._log_softmax_backward_data(grad, output, dim, grad.dtype).to(input_dtype)


# -- cells of recurrent networks; the workspace is the gates ---------------------------------------------------------


def _sum(*terms: torch.Tensor | None) -> torch.Tensor:
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0])


@_own("_thnn_fused_lstm_cell")
def _lstm_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> Any:
    i, f, g, o = _sum(input_gates, hidden_gates, input_bias, hidden_bias).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


@_own("_thnn_fused_lstm_cell_backward_impl")
def _lstm_cell_backward(
    grad_hy: torch.Tensor | None,
    grad_cy: torch.Tensor | None,
    cx: torch.Tensor,
    cy: torch.Tensor,
    gates: torch.Tensor,
    has_bias: bool,
) -> Any:
    i, f, g, o = gates.chunk(4, 1)
    through = cy.tanh()
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = _sum(grad_hy * o * (1 - through * through), grad_cy)
    grads = [grad_c * g * i * (1 - i), grad_c * cx * f * (1 - f), grad_c * i * (1 - g * g)]
    grads.append(grad_hy * through * o * (1 - o))
    grad_gates = torch.cat(grads, 1)
    return grad_gates, grad_c * f, grad_gates.sum(0) if has_bias else None


@_own("_thnn_fused_gru_cell")
def _gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> Any:
    ir, iz, in_ = _sum(input_gates, input_bias).chunk(3, 1)
    hr, hz, hn = _sum(hidden_gates, hidden_bias).chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (in_ + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


@_own("_thnn_fused_gru_cell_backward")
def _gru_cell_backward(grad_hy: torch.Tensor, workspace: torch.Tensor, has_bias: bool) -> Any:
    r, z, n, hx, hn = workspace.chunk(5, 1)
    grad_n = grad_hy * (1 - z) * (1 - n * n)
    grad_z = grad_hy * (hx - n) * z * (1 - z)
    grad_r = grad_n * hn * r * (1 - r)
    to_input = torch.cat([grad_r, grad_z, grad_n], 1)
    to_hidden = torch.cat([grad_r, grad_z, grad_n * r], 1)
    biases = (to_input.sum(0), to_hidden.sum(0)) if has_bias else (None, None)
    return to_input, to_hidden, grad_hy * z, *biases


# -- convolutions and norms ------------------------------------------------------------------------------------------


@_own("_conv_depthwise2d")
def _depthwise(x: torch.Tensor, weight: torch.Tensor, kernel: Any, bias: Any, stride: Any, pad: Any, dil: Any) -> Any:
    return F.conv2d(x, weight, bias, stride, pad, dil, groups=x.shape[1])


@_own("native_layer_norm_backward")
def _layer_norm_backward(grad: Any, x: Any, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any) -> Any:
    """CUDA keeps the statistics in float, the CPU in the input's dtype."""
    mean, rstd = mean.to(x.dtype), rstd.to(x.dtype)
    return aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, mask)


@_own("native_batch_norm_backward")
def _batch_norm_backward(
    grad: Any, x: Any, weight: Any, mean: Any, var: Any, saved: Any, inverse: Any, *rest: Any
) -> Any:
    """As above, but for the dtype, which is the weight's."""
    saved, inverse = (s if s is None or weight is None else s.to(weight.dtype) for s in (saved, inverse))
    return aten.native_batch_norm_backward(grad, x, weight, mean, var, saved, inverse, *rest)


@_own("_fused_rms_norm_backward")
def _rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: list[int],
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    output_mask: list[bool],
) -> Any:
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    normal = x.float() * rstd
    scaled = grad.float() * (1 if weight is None else weight.float())
    grad_x = (scaled - normal * (scaled * normal).mean(dims, keepdim=True)) * rstd
    rest = [dim for dim in range(x.dim()) if dim not in dims]
    grad_weight = (grad.float() * normal).sum(rest) if rest else grad.float() * normal
    of_weight = grad_weight.to(weight.dtype) if weight is not None and output_mask[1] else None
    return grad_x.to(x.dtype) if output_mask[0] else None, of_weight


# -- losses ----------------------------------------------------------------------------------------------------------


@_own("_use_cudnn_ctc_loss")
@_own("_use_cudnn_ctc_loss.Tensor")
@_own("_use_miopen_ctc_loss")
@_own("_use_miopen_ctc_loss.Tensor")
def _use_another_ctc_loss(*args: Any) -> bool:
    return False
