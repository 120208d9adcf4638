"""Autograd's own promises: whatever a graph does without ssdtrain, result or error, it does with it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from conftest import MakeOffload, Send, assert_same, assert_same_error, send
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import ssdtrain

Offload = ssdtrain.ActivationOffload

MODIFIED = "one of the variables needed for gradient computation has been modified by an inplace operation"


def mlp(*, layers: int = 4, width: int = 32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.GELU())])


def grads_of(module: nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in module.parameters()]


# -- in-place changes --------------------------------------------------------------------------------------------


def change_saved(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    view.mul_(2)


def change_base(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    base.mul_(2)


def change_sibling(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    """Touches no saved byte; autograd counts versions per storage and refuses all the same."""
    base[:1].add_(1)


def change_detached(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    view.detach().mul_(2)


def change_without_grad(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    with torch.no_grad():
        leaf.mul_(2)


def change_leaf_view(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    with torch.no_grad():
        leaf[2:].mul_(2)


def change_output(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    output.mul_(2)


def change_through_out(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    torch.mul(view.detach(), 2, out=view.detach())


def change_untracked(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    """`.data` has a version of its own: autograd sees nothing and uses the changed bytes, and so do we."""
    view.data.mul_(2)


def change_nothing_saved(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    view.clone().mul_(2)


CHANGES = [
    change_saved,
    change_base,
    change_sibling,
    change_detached,
    change_without_grad,
    change_leaf_view,
    change_output,
    change_through_out,
    change_untracked,
    change_nothing_saved,
]


@pytest.mark.parametrize("when", ["at once", "on the drive"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_inplace_change_after_save(offload: Offload, change: Callable[..., None], when: str) -> None:
    """PyTorch stops checking versions of saved tensors that went through hooks: gradients are then silently wrong."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        base = leaf * leaf
        view = base[2:]
        output = view.sin().exp()
        if when == "at once":
            change(leaf, base, view, output)
            send()
        else:
            send()
            change(leaf, base, view, output)
        output.sum().backward()
        return leaf.grad

    if change in (change_untracked, change_nothing_saved):
        assert_same(run, offload, travels=None)
    else:
        assert_same_error(run, offload, MODIFIED)


def test_inplace_change_after_the_memory_is_gone(offload: Offload) -> None:
    """The source died long ago, but an alias with other memory still counts versions with it: still an error."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        saved = leaf * 2
        output = saved.sin() * 3
        alias = saved.detach()
        alias.data = torch.zeros(8)
        del saved
        send()
        alias.add_(1)
        output.sum().backward()
        return leaf.grad

    assert_same_error(run, offload, MODIFIED)
    assert offload.stats.written_nbytes > 0


def test_inplace_change_before_the_save_that_is_used(offload: Offload) -> None:
    """Legal: the graph of the old version is never walked, and the new version is another record of one storage."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        hidden = leaf * 1
        unused = hidden.sin()
        send()
        with torch.no_grad():
            hidden.mul_(3)
        output = hidden.cos().sum()
        del hidden
        send()
        output.backward()
        del unused
        return leaf.grad

    assert_same(run, offload)


class ScaleInBackward(torch.autograd.Function):
    """Writes into what it saved, in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.mul_(2)


@pytest.mark.parametrize("is_held", [False, True], ids=["dropped", "held"])
def test_inplace_change_in_backward_and_again(offload: Offload, is_held: bool) -> None:
    """A backward that writes into its saved tensor works once; autograd refuses the second time. Wrong would be to
    hand out the overwritten bytes, from memory that is still shared, as if they were the saved ones."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        hidden = leaf * 1
        output = ScaleInBackward.apply(hidden).sum()
        held = hidden if is_held else None
        del hidden
        send()
        output.backward(retain_graph=True)
        output.backward()
        del held
        return leaf.grad

    assert_same_error(run, offload, MODIFIED)
    assert (offload.stats.read_nbytes > 0) != is_held


def test_inplace_change_in_backward_of_a_shared_storage(offload: Offload) -> None:
    """Two nodes saved one storage and share it again after the reload: what one writes, the other must refuse."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        hidden = leaf * 1
        early = hidden.sin()
        output = (ScaleInBackward.apply(hidden) + early).sum()
        del hidden, early
        send()
        output.backward()
        return leaf.grad

    assert_same_error(run, offload, MODIFIED)


@pytest.mark.parametrize("staging_nbytes", [64 * 1024, 16 << 20], ids=["in many slabs", "at once"])
def test_an_operator_that_saves_before_it_fills(make_offload: MakeOffload, staging_nbytes: int) -> None:
    """`rrelu` saves its noise, then draws it, and never bumps a version: a store that starts in the pack hook writes
    what was in the memory before."""

    def run(send: Send) -> Any:
        leaf = torch.randn(1 << 20, requires_grad=True)
        output = nn.functional.rrelu(leaf * 1, training=True) * 2
        send()
        output.sum().backward()
        return leaf.grad

    offload = make_offload(staging_nbytes=staging_nbytes)
    assert_same(run, offload, travels=None)  # from a slab is as good
    assert offload.stats.offloaded_nbytes >= 8 << 20


# -- walking a graph more than once, or in part --------------------------------------------------------------------


def test_retain_graph(offload: Offload) -> None:
    """Three backwards through one graph: what the first one unpacked and dropped is read again."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        for retain in (True, True, False):
            send()
            loss.backward(retain_graph=retain)
        return grads_of(model)

    assert_same(run, offload)


def test_second_backward_without_retain_graph(offload: Offload) -> None:
    """The same error as without us, and records that are gone."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        send()
        loss.backward()
        loss.backward()

    assert_same_error(run, offload, "backward through the graph a second time")
    assert offload.stats.num_live_records == 0


def test_create_graph(offload: Offload) -> None:
    """A gradient penalty: backward makes a graph of the unpacked tensors, and a second backward goes through both."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32, requires_grad=True)
        y = model(x).square().sum()
        send()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        penalty = (grad.norm(dim=1) - 1).square().sum()
        del grad
        send()
        (y + penalty).backward()
        return grads_of(model)

    assert_same(run, offload)


def test_third_derivative(offload: Offload) -> None:
    def run(send: Send) -> Any:
        x = torch.randn(16, requires_grad=True)
        y = (x * 1).sin().exp().sum()
        results = []
        for _ in range(3):
            send()
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            results.append(y.detach())
        return results

    assert_same(run, offload)


def test_grad_of_parts(offload: Offload) -> None:
    """The upper half first, then the lower half from there, then a leaf in the middle again."""

    def run(send: Send) -> Any:
        lower, upper, x = mlp(), mlp(), torch.randn(4, 32, requires_grad=True)
        middle = lower(x)
        loss = upper(middle).square().sum()
        send()
        (at_middle,) = torch.autograd.grad(loss, middle, retain_graph=True)
        send()
        at_x = torch.autograd.grad(middle, [x, *lower.parameters()], at_middle, retain_graph=True)
        return [at_middle, *at_x, *torch.autograd.grad(loss, list(upper.parameters()))]

    assert_same(run, offload)


def test_backward_with_inputs(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        send()
        loss.backward(inputs=list(model[4].parameters()))
        return grads_of(model)

    assert_same(run, offload)


def test_unused_branch(offload: Offload) -> None:
    """An auxiliary head that no loss reaches: its records wait, and go when the graph goes."""

    def run(send: Send) -> Any:
        body, head, unused, x = mlp(), mlp(), mlp(), torch.randn(4, 32)
        hidden = body(x)
        side = unused(hidden)
        loss = head(hidden).square().sum()
        send()
        loss.backward()
        del side
        return grads_of(body) + grads_of(head) + grads_of(unused)

    assert_same(run, offload)
    assert offload.stats.num_live_records == 0


# -- graphs that end early -----------------------------------------------------------------------------------------


def test_dropped_graph_releases_its_records(offload: Offload) -> None:
    """Evaluation with gradients switched on by mistake, a hundred times: without a cycle to collect, space is reused.

    `exp` saves its own output: held by itself, it would keep its node, and its memory, alive until the next collection.
    """
    gc.collect()
    gc.disable()
    try:
        with offload:
            for _ in range(100):
                hidden = mlp(layers=1)(torch.randn(64, 32)).exp().sigmoid()
                send()
                assert offload.stats.num_live_records > 0
                del hidden
                assert offload.stats.num_live_records == 0
    finally:
        gc.enable()
    assert offload.stats.num_offloaded > 300
    assert offload.stats.peak_disk_nbytes < 1 << 20


def test_dropped_before_anything_was_written(offload: Offload) -> None:
    """The writes not begun are called off, those begun end, and what follows is right."""
    x = torch.randn(256, 256)
    with offload:
        for _ in range(5):
            mlp(width=256)(x)
    assert_same(lambda send: train_once(mlp(), send), offload)


def train_once(model: nn.Module, send: Send) -> list[torch.Tensor | None]:
    loss = model(torch.randn(4, 32)).square().sum()
    send()
    loss.backward()
    return grads_of(model)


class Refuses(torch.autograd.Function):
    """Raises where it is told to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, where: str) -> torch.Tensor:
        ctx.where = where
        ctx.save_for_backward(x)
        if where == "forward":
            raise ArithmeticError("refused in forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.where == "backward":
            raise ArithmeticError("refused in backward")
        return grad, None


@pytest.mark.parametrize("where", ["forward", "backward", "nowhere"])
def test_exception_in_the_middle(offload: Offload, where: str) -> None:
    """A step that fails half way, out of memory say, then a normal one in the same context."""

    def run(send: Send) -> Any:
        lower, upper, x = mlp(), mlp(), torch.randn(4, 32)
        message = ""
        try:
            loss = upper(Refuses.apply(lower(x), where)).square().sum()
            send()
            loss.backward()
        except ArithmeticError as error:
            message = str(error)
        loss = None
        failed = grads_of(lower) + grads_of(upper)
        upper.zero_grad()
        loss = upper(lower(x)).square().sum()
        send()
        loss.backward()
        return [message, failed, grads_of(lower) + grads_of(upper)]

    message, *_ = assert_same(run, offload)
    assert message == ("" if where == "nowhere" else f"refused in {where}")
    assert offload.stats.num_live_records == 0


def test_exception_leaves_the_context_clean(offload: Offload) -> None:
    """The hooks are taken away when the body raises."""
    with pytest.raises(ArithmeticError), offload:
        Refuses.apply(torch.randn(8, requires_grad=True), "forward")
    before = offload.stats.num_saved
    torch.randn(8, requires_grad=True).exp()
    assert offload.stats.num_saved == before


# -- aliases and escapes -------------------------------------------------------------------------------------------


def test_detached_alias(offload: Offload) -> None:
    """A detached tensor shares storage and version: one record serves both sides, and gradient flows through one."""

    def run(send: Send) -> Any:
        leaf = torch.randn(64, requires_grad=True)
        hidden = leaf * 1
        loss = (hidden.sin() * hidden.detach().cos() * hidden.detach()[::2].repeat(2)).sum()
        del hidden
        send()
        loss.backward()
        return leaf.grad

    assert_same(run, offload)


class Stash(torch.autograd.Function):
    """Lets a view of what it saved escape from backward."""

    escaped: ClassVar[list[torch.Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        Stash.escaped.append(x[1:].view(-1))
        return grad * x


def test_a_view_that_escapes_backward(offload: Offload) -> None:
    """Logging code keeps a saved tensor: its memory must not be reused while it does, whatever happens next."""

    def run(send: Send) -> Any:
        Stash.escaped.clear()
        leaf = torch.randn(64, 64, requires_grad=True)
        for i in range(5):
            output = Stash.apply(leaf * i).sum()
            send()
            output.backward()
        return [t.clone() for t in Stash.escaped]

    try:
        assert_same(run, offload)
    finally:
        Stash.escaped.clear()


class Everything(torch.autograd.Function):
    """Saves inputs, outputs, something in between and None; changes one input in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        between = x.sin()
        y.mul_(scale)
        ctx.mark_dirty(y)
        output = between * 2
        ctx.scale = scale
        ctx.save_for_backward(x, None, output, between, y)
        return output, y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, none, output, between, y = ctx.saved_tensors
        assert none is None and torch.equal(ctx.saved_tensors[2], output)  # unpacked for the second time
        return grads[0] * x.cos() * output + between * y, grads[1] * ctx.scale * output, None


def test_custom_function_saves_everything(offload: Offload) -> None:
    def run(send: Send) -> Any:
        x, y = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
        output, dirty = Everything.apply(x * 1, y * 1, 3.0)
        loss = (output * dirty).sum()
        del output, dirty
        send()
        loss.backward()
        return [x.grad, y.grad]

    assert_same(run, offload)


def test_saved_tensor_attributes_of_a_node(offload: Offload) -> None:
    """`grad_fn._saved_self` unpacks too, as often as asked, before and after backward."""

    def run(send: Send) -> Any:
        leaf = torch.randn(64, requires_grad=True)
        output = (leaf * 1).sin()
        send()
        node = output.grad_fn
        before = [node._saved_self.clone(), node._saved_self.clone()]
        output.sum().backward(retain_graph=True)
        return [*before, node._saved_self.clone(), leaf.grad]

    assert_same(run, offload)


# -- other hooks, other modes ----------------------------------------------------------------------------------------


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
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = model(x).float().square().sum()
        send()
        loss.backward()
        return grads_of(model)

    assert_same(run, offload)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use, on first import
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


def test_fake_tensor_mode(offload: Offload) -> None:
    """Shape propagation through a whole step: nothing has bytes, nothing may travel."""

    def run(send: Send) -> Any:
        with torch._subclasses.FakeTensorMode():
            model = mlp()
            loss = model(torch.randn(4, 32)).square().sum()
            loss.backward()
            return [tuple(g.shape) for g in grads_of(model) if g is not None]

    assert_same(run, offload, travels=False)
    assert offload.stats.num_offloaded == 0
    assert offload.stats.skipped["tensor subclass"].count > 0


def test_no_grad_and_inference_mode(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        with torch.no_grad():
            first = model(x)
        with torch.inference_mode():
            second = model(x)
        return [first, second.clone()]

    assert_same(run, offload, travels=False)
    assert offload.stats.num_saved == 0


def test_inference_tensor_in_a_graph(offload: Offload) -> None:
    """Autograd refuses to save it, before our hook is asked."""

    def run(send: Send) -> Any:
        with torch.inference_mode():
            x = torch.randn(8)
        return (torch.randn(8, requires_grad=True) * x).sum()

    assert_same_error(run, offload, "Inference tensors cannot be saved")


# -- threads ---------------------------------------------------------------------------------------------------------


def in_thread(function: Callable[[], Any]) -> Any:
    """Result, or exception, of a function run in another thread."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def test_backward_in_another_thread(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        send()
        in_thread(loss.backward)
        return grads_of(model)

    assert_same(run, offload)


def test_hooks_belong_to_the_thread_that_entered(offload: Offload) -> None:
    """Saved-tensor hooks are the thread's: another one saves as if there were no context."""
    with offload:
        in_thread(lambda: torch.randn(8, requires_grad=True).exp().sum().backward())
    assert offload.stats.num_saved == 0


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "two objects"])
def test_two_threads_train_at_once(make_offload: MakeOffload, shared: bool) -> None:
    """Locks taken in different order would hang here, records filed under the wrong thread mix gradients up."""

    def train(index: int, offload: Offload | None, barrier: threading.Barrier | None) -> list[Any]:
        with lock:  # the seed is global
            torch.manual_seed(index)
            model, xs = mlp(width=64), torch.randn(12, 32, 64)
        for x in xs:
            if barrier is not None:
                barrier.wait(timeout=60)
            if offload is None:
                loss = model(x).square().sum()
            else:
                with offload:
                    loss = model(x).square().sum()
                    send()
            loss.backward()
        return grads_of(model)

    lock = threading.Lock()
    expected = [train(i, None, None) for i in range(2)]
    first = make_offload()
    offloads = [first, first if shared else make_offload()]
    barrier = threading.Barrier(2)
    actual: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: actual.__setitem__(i, train(i, offloads[i], barrier))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for i in range(2):
        assert all(map(torch.equal, actual[i], expected[i]))
    assert all(offload.stats.read_nbytes > 0 for offload in offloads)


def test_two_threads_walk_one_graph(offload: Offload) -> None:
    """Each unpack asks for a record the other thread may be reloading, lending or has just been given."""

    def run(send: Send) -> Any:
        model, x = mlp(layers=8, width=64), torch.randn(16, 64, requires_grad=True)
        loss = model(x * 1).square().sum()
        send()
        results: list[Any] = []
        barrier = threading.Barrier(3)

        def walk() -> None:
            barrier.wait(timeout=60)
            results.extend(torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True) for _ in range(5))

        threads = [threading.Thread(target=walk) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert len(results) == 15
        return results

    assert_same(run, offload)


def test_graphs_in_cycles_die_in_the_middle_of_everything(offload: Offload) -> None:
    """A model that remembers its output is a cycle: the collector frees the graph while some hook holds the lock."""

    def run(send: Send) -> Any:
        model, results = mlp(), []
        for _ in range(20):
            cycle: dict[str, Any] = {"output": model(torch.randn(4, 32))}
            cycle["self"] = cycle
            loss = cycle["output"].square().sum()
            send()
            loss.backward(retain_graph=True)
            results.append([p.grad.clone() for p in model.parameters()])
        return results

    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        assert_same(run, offload)
    finally:
        gc.set_threshold(*threshold)
