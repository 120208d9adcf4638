"""Other hooks and PyTorch's modes: the context gets along with them, or leaves the field to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Send, assert_same, assert_same_error, grads_of, mlp, train_once
from torch.autograd import forward_ad

import ssdtrain

Offload = ssdtrain.ActivationOffload


def test_inner_hooks_win_and_ours_come_back(offload: Offload) -> None:
    """`save_on_cpu` inside: as PyTorch defines, the innermost pair alone sees what is saved there."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        hidden = model[:4](x)
        with torch.autograd.graph.save_on_cpu():
            hidden = model[4:6](hidden)
        loss = model[6:](hidden).square().sum()
        del hidden
        send()
        loss.backward()
        return grads_of(model)

    assert_same(run, offload)


def test_tensor_and_node_hooks(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x, seen = mlp(), torch.randn(4, 32), []
        hidden = model[:4](x)
        hidden.register_hook(lambda grad: grad * 2)
        hidden.grad_fn.register_prehook(lambda grads: seen.append(grads[0].clone()))
        model[4].register_full_backward_hook(lambda module, before, after: seen.append(after[0].clone()))
        loss = model[4:](hidden).square().sum()
        del hidden
        send()
        loss.backward()
        return grads_of(model) + seen

    assert_same(run, offload)


def test_anomaly_mode(offload: Offload) -> None:
    """It checks every gradient for NaN and prints the forward stack; the error is autograd's."""

    def run(send: Send) -> Any:
        leaf = torch.zeros(8, requires_grad=True)
        with torch.autograd.detect_anomaly(check_nan=True):
            loss = ((leaf * 0).sqrt() * 0).sum()
            send()
            loss.backward()

    with pytest.warns(UserWarning, match="Anomaly Detection|Error detected"):
        assert_same_error(run, offload, "returned nan values")


def test_deterministic_mode(offload: Offload) -> None:
    """It fills fresh memory with NaN, our landing memory included, if we took it from `torch.empty`."""

    def run(send: Send) -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            return train_once(mlp(), send)
        finally:
            torch.use_deterministic_algorithms(False)

    assert_same(run, offload)


@pytest.mark.parametrize("cache", [True, False])
def test_autocast(offload: Offload, cache: bool) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, cache_enabled=cache):
            loss = model(x).float().square().sum()
        send()
        loss.backward()
        return grads_of(model)

    assert_same(run, offload)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use, on first import
@pytest.mark.cpu_only
def test_forward_mode_over_reverse_mode(offload: Offload) -> None:
    """Dual tensors: the tangent is saved beside the value and differentiated too."""

    def run(send: Send) -> Any:
        x, tangent = torch.randn(64, requires_grad=True), torch.randn(64)
        with forward_ad.dual_level():
            y = (forward_ad.make_dual(x, tangent) * 1).sin().exp()
            along = forward_ad.unpack_dual(y).tangent.sum()
            del y
            send()
            along.backward()
        return x.grad

    assert_same(run, offload)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_functional_transforms(offload: Offload) -> None:
    """`torch.func` itself refuses to run inside any saved-tensor hooks: an error that says so, and after it all is
    well, also outside again."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.exp()).sum()

    x = torch.randn(8)
    with offload, pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(f)(x)
    assert torch.equal(torch.func.grad(f)(x), torch.func.vjp(f, x)[1](torch.tensor(1.0))[0])
    assert_same(lambda send: train_once(mlp(), send), offload)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_function_inside(offload: Offload, backend: str) -> None:
    """What a compiled function saves are plain tensors at run time, fakes while it is traced."""

    def run(send: Send) -> Any:
        torch._dynamo.reset()
        model, x = mlp(), torch.randn(4, 32)
        part = torch.compile(model[2:6], backend=backend)
        results = []
        for _ in range(2):
            loss = model[6:](part(model[:2](x))).square().sum()
            send()
            loss.backward()
            results += [None if g is None else g.clone() for g in grads_of(model)]
        return results

    assert_same(run, offload)


@pytest.mark.cpu_only
def test_fake_tensor_mode(offload: Offload) -> None:
    """Shape propagation through a whole step: nothing has bytes, nothing may leave."""

    def run(send: Send) -> Any:
        with torch._subclasses.FakeTensorMode():
            model = mlp()
            loss = model(torch.randn(4, 32)).square().sum()
            loss.backward()
            return [tuple(g.shape) for g in grads_of(model) if g is not None]

    assert_same(run, offload, is_offloaded=False)
    assert offload.stats.num_offloaded == 0
    assert offload.stats.skipped["tensor subclass"].count > 0


@pytest.mark.cpu_only
def test_no_grad_and_inference_mode(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        with torch.no_grad():
            first = model(x)
        with torch.inference_mode():
            second = model(x)
        return [first, second.clone()]

    assert_same(run, offload, is_offloaded=False)
    assert offload.stats.num_saved == 0


@pytest.mark.cpu_only
def test_inference_tensor_in_a_graph(offload: Offload) -> None:
    """Autograd refuses to save it, before our hook is asked."""

    def run(send: Send) -> Any:
        with torch.inference_mode():
            x = torch.randn(8)
        return (torch.randn(8, requires_grad=True) * x).sum()

    assert_same_error(run, offload, "Inference tensors cannot be saved")
