"""Signals, forks, exits, many processes: whatever ends a process or begins another, nothing is left, nothing is lost.

Every body runs in a child of its own, see `fault_tools`; children end like any script.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from pathlib import Path

import inside
import pytest
import torch
from drives import Drive
from engine_tools import eventually
from fault_tools import (
    ENGINES,
    KIB,
    Lab,
    Trainer,
    check_equal,
    check_no_record,
    check_nothing_left,
    check_steps,
    drain,
    holdings,
    plain_after_loss,
    plain_steps,
    policy,
    tell,
)

import ssdtrain
from ssdtrain.store.poisonable_lock import ClosedError

every_engine = pytest.mark.parametrize("engine", ENGINES)
kept: list[object] = []  # what lives until the interpreter is gone


# -- signals -----------------------------------------------------------------------------------------------------------


class Pause(torch.autograd.Function):
    """Tells the test that forward, or backward, has come here."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, when: str) -> torch.Tensor:
        ctx.when = when  # type: ignore[attr-defined]
        if when == "forward":
            wait_for_signal()
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.when == "backward":  # type: ignore[attr-defined]
            wait_for_signal()
        return grads[0], None


def wait_for_signal() -> None:
    tell("here")
    while True:
        signal.pause()


def interrupted(directory: str, engine: str, when: str) -> None:
    steps = plain_after_loss(2)
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    middle = len(trainer.model) // 2
    with offload:
        x = trainer.model[:middle](torch.randn(256, 128, generator=trainer.generator))
        drain(offload)
        try:
            trainer.model[middle:](Pause.apply(x, when)).sum().backward()
        except KeyboardInterrupt:
            del x
        else:
            raise AssertionError("not interrupted")
        trainer.zero_grad()
        for expected in steps:
            check_equal(trainer.finish(trainer.forward()), expected)
    check_no_record(offload)


@every_engine
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signals(lab: Lab, small_ext4: Drive, engine: str, when: str, number: signal.Signals) -> None:
    """Killed in the middle of a step, the process is gone at once and all its spill space is free again; after Ctrl-C,
    which arrives as an exception, the next steps are equal."""
    before = small_ext4.used_nbytes
    child = lab.start(interrupted, small_ext4.directory, engine, when)
    assert child.next_event() == "here", child.stderr
    assert small_ext4.used_nbytes > before
    assert list(small_ext4.directory.iterdir()) == []
    os.kill(child.pid, number)
    code = child.wait()
    assert (code, child.stderr) == (0 if number == signal.SIGINT else -number, ""), child.stderr
    assert eventually(lambda: small_ext4.used_nbytes == before), "the space is free again"


def interrupted_anywhere(directory: str, engine: str) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = lambda _: None  # an interrupt inside a destructor is reported there and swallowed
    steps = plain_steps(1)
    offload = ssdtrain.offload_activations(directory, policy(engine, min_nbytes=0, staging_nbytes=64 * KIB))
    num_interrupts = 0
    for i in range(60):
        torch.set_grad_enabled(True)  # an interrupt may have kept `no_grad` from setting it again
        trainer = Trainer(rows=32)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0001 * i)
            with offload:
                trainer.finish(trainer.forward())
        except KeyboardInterrupt:
            num_interrupts += 1
        except ClosedError:  # it came inside a destructor, where Python swallows it, and poisoned the lock
            assert any("interrupted" in text for text in offload.stats.fallbacks)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert inside.store(offload).lock.mutex.acquire(timeout=10), "the lock is free"
        inside.store(offload).lock.mutex.release()
    assert num_interrupts > 0
    check_equal(Trainer().step(offload), steps[0])


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_interrupted_anywhere(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Ctrl-C at sixty moments of a step, wherever that is: no lock stays taken, and the next step is equal.

    Not with the engine in plain Python, whose `threading.Condition` cannot be interrupted safely at every moment.
    """
    lab.run(interrupted_anywhere, tmp_path, engine)


# -- exceptions --------------------------------------------------------------------------------------------------------


class _OopsError(Exception):
    pass


def _raise(*_: object) -> None:
    raise _OopsError


def _in_forward(trainer: Trainer) -> torch.utils.hooks.RemovableHandle:
    return trainer.model[9].register_forward_hook(_raise)


def _in_backward(trainer: Trainer) -> torch.utils.hooks.RemovableHandle:
    return trainer.model[8].register_full_backward_hook(_raise)


def _in_tensor_hook(trainer: Trainer) -> torch.utils.hooks.RemovableHandle:
    return trainer.model[6].weight.register_hook(_raise)


PLACES = {"forward": _in_forward, "backward": _in_backward, "hook": _in_tensor_hook}


def exceptions(directory: str, engine: str) -> None:
    steps = plain_after_loss(2)
    for place in PLACES.values():
        before = holdings()
        offload = ssdtrain.offload_activations(directory, policy(engine))
        trainer = Trainer()
        handle = place(trainer)
        try:
            trainer.step(offload, lambda offload=offload: drain(offload))  # type: ignore[misc]
        except _OopsError:
            pass
        else:
            raise AssertionError("no exception")
        handle.remove()
        trainer.zero_grad()
        for expected in steps:
            check_equal(trainer.step(offload), expected)
        del trainer, handle
        check_nothing_left(offload, before)
        offload.close()


@every_engine
def test_exceptions(lab: Lab, tmp_path: Path, engine: str) -> None:
    """The user's code raises in forward, in backward or in a hook: later steps are equal, nothing is left behind."""
    lab.run(exceptions, tmp_path, engine)


# -- forks -------------------------------------------------------------------------------------------------------------


def in_child(body: object, *arguments: object) -> None:
    """Runs `body` in a fork that ends like a script, and expects it to end well."""
    pid = os.fork()
    if pid == 0:
        try:
            body(*arguments)  # type: ignore[operator]
            sys.stderr.flush()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"in the fork: {error!r}\n")
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the fork failed"


def use_everything(offload: ssdtrain.ActivationOffload, loss: torch.Tensor, directory: str) -> None:
    assert "tensors saved" in str(offload.stats)
    torch.randn(256, 128, requires_grad=True).sin().sum().backward()  # hooks are active
    try:
        loss.backward()
    except RuntimeError as error:
        if "Expected an open offload for backward" not in str(error):
            raise
    else:
        raise AssertionError("the parent's bytes cannot be here")
    check_steps(ssdtrain.offload_activations(directory, policy()))  # with an engine of its own
    check_steps(offload)
    offload.__exit__(None, None, None)
    offload.close()


def forks(directory: str, engine: str) -> None:
    steps = plain_steps()
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    offload.__enter__()
    others = [Trainer().forward()]
    drain(offload)
    forked = []

    def fork_once(_: torch.Tensor) -> None:
        if not forked:  # prefetched reads are in flight
            forked.append(True)
            with torch.enable_grad():
                in_child(use_everything, offload, others[0], directory)

    for expected in steps:
        loss = trainer.forward()
        drain(offload)
        handle = trainer.model[8].weight.register_hook(fork_once)
        check_equal(trainer.finish(loss), expected)
        handle.remove()
        assert forked.pop()
    others.pop().backward()
    del loss
    offload.__exit__(None, None, None)
    check_no_record(offload)
    assert not offload.stats.fallbacks, offload.stats.fallbacks


@every_engine
def test_forks(lab: Lab, tmp_path: Path, engine: str) -> None:
    """A fork in the middle of backward, with reads in flight. The child gets a clear error for its parent's bytes and
    can train with an engine of its own; the parent does not notice."""
    lab.run(forks, tmp_path, engine)


def train_under_inherited_hooks(
    offload: ssdtrain.ActivationOffload, trainer: Trainer, steps: list[list[torch.Tensor]], lost: torch.Tensor
) -> None:
    """The engine opens again when something is saved; nothing is ever read from where the parent's bytes would be."""
    before = offload.stats
    for expected in steps:
        loss = trainer.forward()
        drain(offload)
        check_equal(trainer.finish(loss), expected)
    after = offload.stats
    assert after.read_nbytes > before.read_nbytes and after.num_offloaded > before.num_offloaded, after
    assert not after.fallbacks, after.fallbacks
    with pytest.raises(RuntimeError, match="of the parent process"):
        lost.backward()
    offload.__exit__(None, None, None)
    check_steps(offload)
    offload.close()


def forked_trainings(directory: str, engine: str, mode: str) -> None:
    steps = plain_steps(5)
    offload = ssdtrain.offload_activations(directory, policy(engine, mode=mode))
    with offload:
        lost = Trainer().forward()
        drain(offload)
        trainer = Trainer()
        check_equal(trainer.finish(trainer.forward()), steps[0])
        in_child(train_under_inherited_hooks, offload, trainer, steps[1:], lost)
        for expected in steps[1:]:
            check_equal(trainer.finish(trainer.forward()), expected)
        lost.backward()
    assert not offload.stats.fallbacks, offload.stats.fallbacks


@pytest.mark.parametrize("engine, mode", [*((engine, "all") for engine in ENGINES), ("threads", "auto")])
def test_a_forked_child_trains_under_inherited_hooks(lab: Lab, tmp_path: Path, engine: str, mode: str) -> None:
    """As launchers for notebooks and Lightning's `ddp_fork` start their workers."""
    lab.run(forked_trainings, tmp_path, engine, mode)


def fork_under_the_lock(directory: str, engine: str) -> None:
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    loss = None
    with offload:
        loss = trainer.forward()
        drain(offload)
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with inside.store(offload).lock.mutex:
            is_held.set()
            may_go.wait()

    def leave() -> None:
        nonlocal loss
        del loss  # dying handles
        check_steps(offload)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    in_child(leave)
    may_go.set()
    thread.join()
    check_equal(trainer.finish(loss), plain_steps(1)[0])


@every_engine
def test_fork_while_another_thread_holds_the_lock(lab: Lab, tmp_path: Path, engine: str) -> None:
    """The child inherits a lock whose owner does not exist there; it must not wait for it."""
    lab.run(fork_under_the_lock, tmp_path, engine, seconds=20)


class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        x = torch.full((128, 128), float(i), requires_grad=True)
        x.sin().sum().backward()
        assert x.grad is not None
        return x.grad


def data_loader(directory: str, engine: str) -> None:
    steps = plain_steps()
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    with offload:
        for expected in steps:
            loss = trainer.forward()
            loader = torch.utils.data.DataLoader(Batches(), num_workers=2, multiprocessing_context="fork")
            for i, batch in enumerate(loader):
                assert torch.equal(batch[0], torch.full((128, 128), float(i)).cos())
            check_equal(trainer.finish(loss), expected)
            del loss
    check_no_record(offload)
    assert not offload.stats.fallbacks, offload.stats.fallbacks


@every_engine
def test_data_loader_workers(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Forked workers run autograd under inherited hooks and exit, while the parent's records are on the drive."""
    lab.run(data_loader, tmp_path, engine)


def spawned(_: int, directory: str) -> None:
    from fault_tools import check_steps, drain, policy

    offload = ssdtrain.offload_activations(directory, policy())
    check_steps(offload, lambda: drain(offload))


def test_spawn(tmp_path: Path) -> None:
    """torch.multiprocessing starts ranks anew while their parent's engine is open: all train with equal results."""
    with ssdtrain.offload_activations(tmp_path, policy()) as offload:
        loss = Trainer().forward()
        torch.multiprocessing.spawn(spawned, (str(tmp_path),), nprocs=2)
        loss.backward()
        del loss
    check_no_record(offload)
    assert list(tmp_path.iterdir()) == []


# -- exits -------------------------------------------------------------------------------------------------------------


def exits(directory: str, engine: str, how: str) -> None:
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    kept.extend([offload, trainer])
    if how == "never entered":
        return
    offload.__enter__()
    loss = trainer.forward()
    kept.append(loss)
    if how == "requests in flight":
        kept.append(trainer.forward())
        return
    drain(offload)
    if how == "reads in flight":
        loss.register_hook(lambda _: sys.exit())  # never runs: the root's hook runs first, hence one further down
        trainer.model[10].weight.register_hook(lambda _: sys.exit())
        loss.backward()
    if how == "live graph":
        offload.__exit__(None, None, None)
    if how == "cycle":
        kept.append(kept)
    if how == "sys.exit":
        with ssdtrain.offload_activations(directory, policy(engine)) as inner:
            kept.extend([inner, trainer.forward()])
            sys.exit()
    if how == "atexit":
        expected = plain_steps(1)[0]
        atexit.register(lambda: check_equal(trainer.finish(loss), expected))
        offload.__exit__(None, None, None)
    if how == "thread":
        thread = threading.Thread(target=lambda: kept.append(Trainer().step(offload)))
        thread.start()


@every_engine
@pytest.mark.parametrize(
    "how",
    [
        "never entered",
        "requests in flight",
        "reads in flight",
        "live graph",
        "cycle",
        "never left",
        "sys.exit",
        "atexit",
        "thread",
    ],
)
def test_exits(lab: Lab, tmp_path: Path, engine: str, how: str) -> None:
    """However a script ends (live graphs, contexts never left, requests in flight, a handler that still runs backward):
    exit code 0, nothing on stderr, promptly."""
    lab.run(exits, tmp_path, engine, how, seconds=20)
    assert list(tmp_path.iterdir()) == []


# -- many processes ----------------------------------------------------------------------------------------------------


def one_of_many(directory: str, seed: int) -> None:
    offload = ssdtrain.offload_activations(directory, policy(staging_nbytes=64 * KIB))
    torch.manual_seed(seed)
    source = torch.randn(256, 128)
    x = (source * 1).requires_grad_()
    with offload:
        y = x * 1
        for _ in range(8):
            y = y.sin()
    drain(offload)
    y.sum().backward()
    z, product = source, torch.ones_like(source)
    for _ in range(8):
        z, product = z.sin(), product * z.cos()
    assert x.grad is not None and torch.allclose(x.grad, product)
    check_steps(offload, lambda: drain(offload))
    assert offload.stats.read_nbytes > 0


def test_many_processes_share_a_directory(lab: Lab, tmp_path: Path) -> None:
    """Twelve ranks on one drive: each has a file of its own, all finish, all are equal."""
    children = [lab.start(one_of_many, tmp_path, seed) for seed in range(12)]
    for child in children:
        assert (child.wait(), child.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
