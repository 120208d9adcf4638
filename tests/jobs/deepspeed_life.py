"""Cases of `test_deepspeed.py` about when the hooks are on, what ends them, ways in, and what goes wrong."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from deepspeed_tools import (
    KEEP,
    POLICY,
    ROWS,
    WIDTH,
    Block,
    Case,
    Model,
    end,
    facts,
    loss_of,
    parameters_of,
    raises,
    same,
    section,
    zero,
)
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef

import ssdtrain
import ssdtrain.integrations.deepspeed as integration
from ssdtrain.integrations.deepspeed.section import begin
from ssdtrain.store.saved_tensors import innermost_hooks


def _batch(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def _step(engine: Any, seed: int = 0) -> torch.Tensor:
    loss = loss_of(engine(_batch(seed)))
    engine.backward(loss)
    engine.step()
    return loss.detach()


# -- what is covered ---------------------------------------------------------------------------------------------------


def loss_is_covered(directory: str) -> dict[str, Any]:
    """What the user's loss saves is offloaded too, backward begins without hooks, the engine stays open in between."""
    engine = Case(zero(1)).build(section(directory))
    output = engine(_batch())
    before = engine.ssdtrain.stats
    big = output.repeat(8, 1).exp()
    loss = big.exp().log().mean()
    after = engine.ssdtrain.stats
    assert after.offloaded_nbytes - before.offloaded_nbytes >= big.nbytes, (before, after)
    assert innermost_hooks() is not None
    engine.backward(loss)
    assert innermost_hooks() is None
    engine.step()
    files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    assert any(file.startswith(directory) for file in files), "the spill file was closed between steps"
    return facts(end(engine), directory)


def interrupted(directory: str) -> dict[str, Any]:
    """Whatever comes between forward and backward, the numbers are those without ssdtrain."""
    plain, ours = _interrupted(None), _interrupted(section(directory))
    return {"losses": same(plain[0], ours[0]), "parameters": same(plain[1], ours[1])} | facts(ours[2], directory)


def _interrupted(own: dict[str, Any] | None) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    engine, other = Case(zero(1)).build(own), Case(zero(2)).build(own)
    losses = [_step(engine)]
    _fail_in_forward(engine)
    losses.append(_step(engine, 1))
    with contextlib.suppress(ZeroDivisionError):  # in the loss
        losses.append(loss_of(engine(_batch(2))) / (1 // 0))
    losses.append(_step(other, 3))  # another engine, while the first one's loss never came
    output = engine(_batch(4))
    engine.eval()
    with torch.no_grad():  # evaluation between forward and loss
        losses.append(loss_of(engine(_batch(5))))
    engine.train()
    losses.append(engine.backward(loss_of(output)).detach())
    engine.step()
    losses += _two_at_once(engine, other)
    with save_on_cpu():  # others' hooks round the forward, and round everything
        output = engine(_batch(6))
    losses.append(engine.backward(loss_of(output)).detach())
    engine.step()
    with save_on_cpu():
        losses.append(_step(engine, 7))
    loss = loss_of(engine(_batch(8)))
    with save_on_cpu():  # others' hooks are the innermost when backward begins
        engine.backward(loss)
    engine.step()
    with disable_saved_tensors_hooks("not here"):
        losses.append(_step(engine, 9))
    loss = loss_of(engine(_batch(10)))
    loss.backward()  # without the engine
    engine.step()
    assert innermost_hooks() is None, "hooks were left on"
    parameters = parameters_of(engine) + parameters_of(other)
    end(other)
    return losses, parameters, end(engine)


def _fail_in_forward(engine: Any) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise ZeroDivisionError

    handle = engine.module.blocks[-1].register_forward_pre_hook(fail)
    with contextlib.suppress(ZeroDivisionError):
        engine(_batch())
    handle.remove()
    assert innermost_hooks() is None, "hooks were left on by a forward that failed"


def _two_at_once(engine: Any, other: Any) -> list[torch.Tensor]:
    """One after the other, and one within the other's graph."""
    first, second = engine(_batch(11)), other(_batch(12))
    losses = [engine.backward(loss_of(first)).detach(), other.backward(loss_of(second)).detach()]
    engine.step()
    other.step()
    return losses


# -- weights -----------------------------------------------------------------------------------------------------------


class _Detached(nn.Module):
    """Uses a frozen weight through a detached alias only: nothing but its storage tells what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight.detach())


def weights_stay(directory: str) -> dict[str, Any]:
    """With activations too small to leave nothing leaves: parameters, gathered or not, are never taken for them."""
    offloaded = {}
    for stage in (0, 1, 2, 3):
        alone = {"stage3_prefetch_bucket_size": 0} if stage == 3 else {}  # each is gathered in a buffer of its own
        case = Case(zero(stage, **alone), lambda: nn.Sequential(_Detached(), Block(), _Detached()))
        engine = case.build(section(directory, POLICY | {"min_nbytes": "12KiB"}))
        for seed in range(2):
            engine.backward(engine(_batch(seed, rows=8).requires_grad_()).square().mean())
            engine.step()
        stats = end(engine)
        assert stats is not None
        assert stats.skipped["weight"].nbytes > 0
        offloaded[str(stage)] = stats.num_offloaded
    return {"offloaded": offloaded}


class _Plain(Block):
    """Saves its parameters as themselves only, so that ZeRO-3 can free all of them after forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class _PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[_Plain() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def gathered_memory_is_freed(directory: str) -> dict[str, Any]:
    """After forward none of the memory that parameters were gathered in is alive, and after backward neither."""
    return {name: _alive(own) for name, own in (("plain", None), ("ours", section(directory)))}


def _alive(own: dict[str, Any] | None) -> list[int]:
    engine = Case(zero(3), _PlainModel).build(own)
    seen: dict[int, StorageWeakRef] = {}

    def note(module: nn.Module, args: object) -> None:
        for parameter in module.parameters(recurse=False):
            storage = parameter.untyped_storage()
            if storage.nbytes():
                ref = StorageWeakRef(storage)
                seen[ref.cdata] = ref

    for module in engine.module.modules():
        module.register_forward_pre_hook(note)
    loss = loss_of(engine(_batch()))
    after_forward = sum(not ref.expired() for ref in seen.values())
    engine.backward(loss)
    engine.step()
    after_step = sum(not ref.expired() for ref in seen.values())
    num_seen = len(seen)
    end(engine)
    return [num_seen, after_forward, after_step]


# -- ways in -----------------------------------------------------------------------------------------------------------


def ways_in(directory: str) -> dict[str, Any]:
    """From a dict, a file, the arguments, by position; and as if it were not there without the section."""
    config = {"train_micro_batch_size_per_gpu": ROWS, "ssdtrain": section(directory)}
    config |= {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    file = Path(directory).parent / "ds.json"
    file.write_text(json.dumps(config))
    ways: list[Callable[[], Any]] = [
        lambda: deepspeed.initialize(model=Model(), config=dict(config)),
        lambda: deepspeed.initialize(model=Model(), config=str(file)),
        lambda: deepspeed.initialize(model=Model(), config_params=str(file)),
        lambda: deepspeed.initialize(Namespace(deepspeed_config=str(file)), Model()),
        lambda: integration.initialize(None, Model(), config=dict(config)),
    ]
    offloaded = []
    for way in ways:
        engine = way()[0]
        _step(engine)
        offloaded.append(engine.ssdtrain.stats.num_offloaded)
        end(engine)
    original = integration.initialize.__wrapped__  # type: ignore[attr-defined]
    assert inspect.signature(deepspeed.initialize) == inspect.signature(original)
    without = _attributes(Case(zero(1)).build(None))
    integration.uninstall()
    assert deepspeed.initialize is original
    ignored = _attributes(Case(zero(1)).build(section(directory)))
    integration.install()
    integration.install()
    disabled = _attributes(Case(zero(1)).build({"enabled": False, "activations": {"directory": "/nowhere"}}))
    return {"offloaded": offloaded, "without": without, "ignored": ignored, "disabled": disabled}


def parameters_stay_theirs(directory: str) -> dict[str, Any]:
    """DeepSpeed moves parameters and optimizer state itself: ours declines, with what to use instead."""
    engine = Case(zero(3)).build(None)
    refusals = []
    for offload in (
        lambda: ssdtrain.offload_parameters(engine.module, directory, {"min_nbytes": 0}, ["*"]),
        lambda: ssdtrain.offload_optimizer(engine.optimizer, directory),
    ):
        try:
            offload()
        except (TypeError, ValueError) as error:
            refusals.append(str(error))
    _step(engine)  # and it trains on
    end(engine)
    return {"refusals": refusals, "left": [path.name for path in Path(directory).iterdir()]}


def _attributes(engine: Any) -> list[str]:
    """What of ours an engine has."""
    _step(engine)
    names = [name for name in ("ssdtrain", "forward", "backward", "step", "destroy") if name in engine.__dict__]
    end(engine)
    return names


def log_and_detach(directory: str) -> dict[str, Any]:
    """A line every `steps_per_print` steps; after `detach` the engine is as DeepSpeed made it, and goes on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed_logger.addHandler(handler)
    engine = Case(zero(1), micro_batches=2).build(section(directory))
    for seed in range(8):
        _step(engine, seed)
    deepspeed_logger.removeHandler(handler)
    own = engine.ssdtrain
    own.detach()
    before = own.stats.num_saved
    _step(engine)
    assert own.stats.num_saved == before
    assert "forward" not in engine.__dict__ and innermost_hooks() is None
    return {"lines": [line for line in lines if "ssdtrain: step=" in line]} | facts(end(engine), directory)


def dropped(directory: str) -> dict[str, Any]:
    """An engine nobody destroys, its last loss never backward; DeepSpeed keeps it. The next engine trains as ever."""
    engine = Case(zero(3)).build(section(directory))
    loss = loss_of(engine(_batch()))
    del loss
    engine = None
    gc.collect()
    engine = Case(zero(1)).build(section(directory))
    _step(engine)
    return facts(end(engine), directory)


def saved_and_resumed(directory: str) -> dict[str, Any]:
    """A checkpoint taken with ssdtrain goes on the same with it and without it, and has nothing of it inside."""
    folder = Path(directory).parent / "checkpoint"
    engine = Case(zero(2)).build(section(directory))
    for seed in range(2):
        _step(engine, seed)
    engine.save_checkpoint(str(folder), tag="here", client_state={"mine": 1})
    expected = [_step(engine, seed) for seed in range(2, 4)]
    expected_parameters = parameters_of(engine)
    end(engine)
    equal = []
    for own in (None, section(directory), section(directory, KEEP)):
        engine = Case(zero(2)).build(own)
        _, client = engine.load_checkpoint(str(folder), tag="here")
        assert client["mine"] == 1
        losses = [_step(engine, seed) for seed in range(2, 4)]
        equal.append(same(losses, expected) and same(parameters_of(engine), expected_parameters))
        end(engine)
    return {"equal": equal, "inside": [path.name for path in folder.rglob("*.pt") if _holds_ours(path)]}


def _holds_ours(path: Path) -> bool:
    """Whether a checkpoint has anything of ssdtrain, beside the configuration, which DeepSpeed saves too."""
    state = torch.load(path, weights_only=False)
    state.pop("ds_config", None)
    return "ssdtrain" in str(state)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def errors(directory: str) -> dict[str, Any]:
    """Errors come on every rank, none is left waiting, and the next attempt works."""
    rank, num_ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    good = section(directory)
    with raises(ValueError, "got 'activation'. Did you mean 'activations'?"):
        Case().build({"activation": good["activations"]})
    with raises(ValueError, "Did you mean 'min_nbytes'?"):
        Case().build({"activations": good["activations"] | {"min_nbyte": 1}})
    with raises(ValueError, "'directory'"):
        Case().build({"enabled": True, "activations": {"mode": "all"}})
    last = num_ranks - 1
    missing = section(directory if rank != last else "/nowhere/at/all")
    kind, text = (
        (FileNotFoundError, "does not exist") if rank == last else (RuntimeError, f"on rank {last} FileNotFound")
    )
    with raises(kind, text):
        Case().build(missing)
    kind, text = (ValueError, "keys among") if rank == 0 else (RuntimeError, "on rank 0 ValueError")
    with raises(kind, text):
        Case().build(good | ({"wrong": 1} if rank == 0 else {}))
    with raises(Exception, "Expected a string path to an existing deepspeed config"):
        deepspeed.initialize(model=Model(), config="/nowhere/ds.json")
    with raises(AssertionError, "train_batch_size"):  # DeepSpeed's own error: what was opened for it is closed
        Case({"train_batch_size": 7}).build(good)
    engine = Case(zero(1)).build(good)
    _step(engine)
    return facts(end(engine), directory)


def one_directory_per_rank(directory: str) -> dict[str, Any]:
    """`{local_rank}` is filled in."""
    place = str(Path(directory).parent / "spill{local_rank}")
    engine = Case(zero(3)).build(section(place))
    _step(engine)
    own = Path(directory).name
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    used = {Path(link).parent.name for link in links if "/spill" in link}
    return facts(end(engine), directory) | {"own": own, "used": sorted(used)}


def shared_drive(directory: str) -> dict[str, Any]:
    """A drive that ZeRO-Infinity uses too is allowed, and noted."""
    config = zero(3, offload_optimizer={"device": "nvme", "nvme_path": str(Path(directory).parent)})
    session = begin(config | {"ssdtrain": section(directory)})
    assert session is not None and session.stats is not None
    notes = list(session.stats.fallbacks)
    session.close()
    return {"notes": notes}
