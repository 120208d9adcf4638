"""With `step_in_backward` a backward changes the parameters it is for, once each, or none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_tools import EAGER_STATE, WIDTH, adamw, batch, check_same, check_same_state, grad_nbytes, values
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ssdtrain
from ssdtrain.optimizer.gradients.reached import has_reentrant_checkpoints

IN_BACKWARD = EAGER_STATE | {"chunk_nbytes": 1, "step_in_backward": True}


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> ssdtrain.OffloadedOptimizer:
    found = ssdtrain.offload_optimizer(optimizer, folder, IN_BACKWARD | policy)
    assert isinstance(found, ssdtrain.OffloadedOptimizer)
    return found


def two_parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, WIDTH)


# -- one graph, two optimizers -----------------------------------------------------------------------------------------


def adversarial(
    make: Callable[[nn.Module], torch.optim.Optimizer], around: Callable[[Any], Any]
) -> list[dict[str, torch.Tensor]]:
    """A generator and a discriminator; `around` is entered with the latter's optimizer for the former's backward."""
    generator, discriminator = two_parts()
    of_generator, of_discriminator = make(generator), make(discriminator)
    for step in range(4):
        fake = generator(batch(step))
        if step % 2:
            (discriminator(fake.detach()).mean() - discriminator(batch(step + 9)).mean()).backward()
            of_discriminator.step()
            of_discriminator.zero_grad()
        with around(of_discriminator):
            (-discriminator(fake).square().mean()).backward()
        of_generator.step()
        of_generator.zero_grad()
        of_discriminator.zero_grad()
    return [values(generator), values(discriminator)]


def test_a_backward_that_reaches_another_optimizer_is_refused(tmp_path: Path) -> None:
    """The generator's loss comes by way of the discriminator, which was updated by it; nobody had asked for that."""
    made: list[tuple[nn.Module, Any, dict[str, torch.Tensor]]] = []

    def make(module: nn.Module, **policy: Any) -> torch.optim.Optimizer:
        optimizer = offloaded(adamw(module.parameters()), tmp_path, **policy)
        made.append((module, optimizer, values(module)))
        return optimizer

    ways: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
        make,
        lambda m: make(m, step_in_backward="together" if made else True),
        lambda m: make(m, step_in_backward=bool(made)),
        lambda m: make(m, step_in_backward=not made, offload_gradients=bool(made)),
    ]
    for way in ways:
        made.clear()
        with pytest.raises(RuntimeError, match=r"those of AdamW and parameter \d of group 0 of AdamW") as caught:
            adversarial(way, lambda _: contextlib.nullcontext())
        assert all(word in str(caught.value) for word in ("accumulate()", "requires_grad_(False)", "'together'"))
        for module, optimizer, before in made:
            check_same(values(module), before)
            optimizer.zero_grad()
            optimizer.state_dict()
            optimizer.close()


def test_a_backward_that_is_not_for_an_optimizer_leaves_it_alone(tmp_path: Path) -> None:
    """In `accumulate()` of the other one, or with its parameters frozen: both trainings are as plain."""

    @contextlib.contextmanager
    def frozen(optimizer: torch.optim.Optimizer) -> Any:
        parameters = optimizer.param_groups[0]["params"]
        for p in parameters:
            p.requires_grad_(False)
        yield
        for p in parameters:
            p.requires_grad_(True)

    expected = adversarial(lambda m: adamw(m.parameters()), lambda _: contextlib.nullcontext())
    for around in (lambda o: o.accumulate(), frozen):
        check_same(adversarial(lambda m: offloaded(adamw(m.parameters()), tmp_path), around), expected)


def test_optimizers_that_step_together(tmp_path: Path) -> None:
    """One for matrices, one for the rest, as with Muon: both say so, and each updates its own in the one backward."""

    def go(folder: Path | None, **policy: Any) -> list[Any]:
        model = nn.Sequential(*two_parts())
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() < 2]
        both: list[torch.optim.Optimizer] = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), adamw(rest)]
        if folder is not None:
            both = [offloaded(optimizer, folder, **policy) for optimizer in both]
        for step in range(3):
            model(batch(step)).square().mean().backward()
            assert folder is None or grad_nbytes(model) == 0
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
        return [values(model)]

    check_same(go(tmp_path, step_in_backward="together"), go(None))
    with pytest.raises(RuntimeError, match="'together'"):
        go(tmp_path)


def test_a_closed_or_collected_optimizer_is_nobodys_business(tmp_path: Path) -> None:
    generator, discriminator = two_parts()
    optimizer = offloaded(adamw(generator.parameters()), tmp_path)
    offloaded(adamw(discriminator.parameters()), tmp_path).close()
    discriminator(generator(batch(0))).mean().backward()
    optimizer.step()


def test_a_group_that_is_gone_is_not_updated(tmp_path: Path) -> None:
    """It was, by the first backward after it was taken away; plain training updates in `step()`, which does without."""

    def go(make: Callable[[Any], torch.optim.Optimizer]) -> list[Any]:
        parts = two_parts()
        optimizer = make([{"params": list(part.parameters())} for part in parts])
        for step in range(4):
            parts[1](parts[0](batch(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                optimizer.param_groups.pop(0)
        return [values(part) for part in parts]

    check_same(go(lambda groups: offloaded(adamw(groups), tmp_path)), go(adamw))


def test_a_backward_for_chosen_parameters(tmp_path: Path) -> None:
    """`backward(inputs=...)` reaches these alone, whatever the graph has besides."""

    def go(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Any]:
        generator, discriminator = two_parts()
        optimizers = [make(generator), make(discriminator)]
        for step in range(3):
            loss = discriminator(generator(batch(step))).square().mean()
            loss.backward(inputs=list(generator.parameters()), retain_graph=True)
            loss.neg().backward(inputs=list(discriminator.parameters()))
            for optimizer in reversed(optimizers):
                optimizer.step()
                optimizer.zero_grad()
        return [values(generator), values(discriminator)]

    expected = go(lambda module: adamw(module.parameters()))
    check_same(go(lambda module: offloaded(adamw(module.parameters()), tmp_path)), expected)


# -- one backward inside another ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Layers in reentrant checkpoints; what is shared gets its gradient in several backward passes of one step."""

    def __init__(self, shares: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if shares == "between checkpoints":
            self.layers[2] = self.layers[0]
        if shares == "with the rest":
            self.last = self.layers[1]  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=True)
        return F.gelu(self.last(x)).square().mean()


@pytest.mark.parametrize("chunk_nbytes", [1, 1 << 20], ids=["each", "all"])
@pytest.mark.parametrize("shares", ["nothing", "between checkpoints", "with the rest"])
def test_reentrant_checkpoints_that_share_a_weight(shares: str, chunk_nbytes: int, tmp_path: Path) -> None:
    """The weight was updated after the first of its gradients, its layer run again with the new one, then an error.

    Only what is shared stays until the step, from the second step on.
    """

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, waiting: list[int]) -> list[torch.Tensor]:
        losses = []
        for step in range(3):
            loss = model(batch(step).requires_grad_())
            loss.backward()
            waiting.append(grad_nbytes(model))
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    plain, model = Shared(shares), Shared(shares)
    expected = adamw(plain.parameters())
    optimizer = offloaded(adamw(model.parameters()), tmp_path, chunk_nbytes=chunk_nbytes)
    waiting: list[int] = []
    check_same(go(model, optimizer, waiting), go(plain, expected, []))
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    if chunk_nbytes == 1:
        of_a_layer = sum(p.nbytes for p in model.layers[0].parameters())  # type: ignore[index,union-attr]
        assert waiting[1:] == ([0, 0] if shares == "nothing" else [of_a_layer] * 2)
    assert any("reentrant" in text for text in optimizer.stats.fallbacks)
    optimizer.close()


def test_a_checkpoint_that_is_not_reentrant_needs_none_of_this(tmp_path: Path) -> None:
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = offloaded(adamw(model.parameters()), tmp_path)
    x = checkpoint(model, batch(0), use_reentrant=False)
    checkpoint(model, x, use_reentrant=False).mean().backward()
    assert grad_nbytes(model) == 0 and not optimizer.stats.fallbacks
    optimizer.step()


def test_looking_for_reentrant_checkpoints_breaks_no_other_thread() -> None:
    """A thread that builds tuples meanwhile: whoever holds one that is not finished makes an error of it."""
    errors: list[SystemError] = []
    is_over = threading.Event()

    def build() -> None:
        while not is_over.is_set() and not errors:
            try:
                assert len(tuple(i for i in range(50))) == 50
            except SystemError as error:
                errors.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    for _ in range(5):
        has_reentrant_checkpoints()
    is_over.set()
    thread.join()
    assert not errors
