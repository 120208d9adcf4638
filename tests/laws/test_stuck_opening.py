"""A drive that does not answer when a file is opened, grown, shortened or closed costs the time allowed, and no more.

Every body runs in a child of its own, where a library plays the drive: see `fault_tools` and `preload.c`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from engine_tools import eventually
from fault_tools import (
    ENGINES,
    Lab,
    Trainer,
    check_equal,
    check_one_warning_per_kind,
    drain,
    holdings,
    plain_steps,
    policy,
    tell,
)

import ssdtrain

STUCK_SECONDS = 1.5  # a drive that answers does so in time also on a busy machine
FAR = 20.0  # a hang, on the slowest machine
OPENS, GROWS, SHORTENS, CLOSES, LOOKS, ASKS_ROOM = "ogtcav"
every_engine = pytest.mark.parametrize("engine", ENGINES)


def stick(letters: str, under: str) -> None:
    os.environ["FAKE_STUCK_UNDER"] = under
    os.environ["FAKE_STUCK"] = letters


def answer() -> None:
    del os.environ["FAKE_STUCK"]


def impatient(engine: str = "auto", **fields: object) -> dict[str, object]:
    return policy(engine, io_timeout_seconds=STUCK_SECONDS, **fields)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


# -- one context per step ----------------------------------------------------------------------------------------------


def between_steps(directory: str, engine: str, letters: str) -> None:
    steps = plain_steps(5)
    offload = ssdtrain.offload_activations(directory, impatient(engine))
    trainer = Trainer()
    check_equal(trainer.step(offload, lambda: drain(offload)), steps[0])
    offloaded = offload.stats.num_offloaded
    assert offloaded > 0
    stick(letters, directory)
    begin = time.monotonic()
    for expected in steps[1:4]:
        check_equal(trainer.step(offload), expected)
    assert time.monotonic() - begin < FAR
    threads = num_threads()
    check_equal(trainer.step(offload), steps[4])
    assert num_threads() <= threads, "a thread per step"
    said = offload.stats.fallbacks
    assert any(directory in text and "not used any more" in text for text in said), said
    check_one_warning_per_kind(offload)
    begin = time.monotonic()
    offload.close()
    assert time.monotonic() - begin < FAR


@every_engine
@pytest.mark.parametrize("letters", [GROWS, "ogtcav"])
def test_a_drive_that_sticks_between_steps(lab: Lab, tmp_path: Path, engine: str, letters: str) -> None:
    """Every step opened the files anew and hung as long as the drive did, with the lock that every hook takes."""
    lab.run(between_steps, tmp_path, engine, letters)


def opened_once(directory: str, engine: str) -> None:
    steps = plain_steps(4)
    offload = ssdtrain.offload_activations(directory, impatient(engine))
    trainer = Trainer()
    check_equal(trainer.step(offload), steps[0])
    stick(OPENS + CLOSES, directory)
    for expected in steps[1:]:
        check_equal(trainer.step(offload, lambda: drain(offload)), expected)
    assert not offload.stats.fallbacks and offload.stats.read_nbytes > 0, str(offload.stats)
    answer()
    offload.close()


@every_engine
def test_a_context_per_step_opens_its_files_once(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Opening, probing and closing are not asked of the drive again, by any engine."""
    lab.run(opened_once, tmp_path, engine)


def other_directory_goes_on(stuck: str, good: str, engine: str) -> None:
    steps = plain_steps(3)
    offload = ssdtrain.offload_activations([stuck, good], impatient(engine))
    trainer = Trainer()
    check_equal(trainer.step(offload), steps[0])
    stick("ogtcv", stuck)
    check_equal(trainer.step(offload, lambda: drain(offload)), steps[1])
    before = offload.stats.written_nbytes
    check_equal(trainer.step(offload, lambda: drain(offload)), steps[2])
    assert offload.stats.written_nbytes > before
    assert sum(stuck in text for text in offload.stats.fallbacks) == 1, str(offload.stats)
    assert not any(good in text for text in offload.stats.fallbacks)
    offload.close()


@every_engine
def test_others_go_on(lab: Lab, tmp_path: Path, engine: str) -> None:
    for name in ("stuck", "good"):
        (tmp_path / name).mkdir()
    lab.run(other_directory_goes_on, tmp_path / "stuck", tmp_path / "good", engine)


def lock_is_free(directory: str) -> None:
    """Another thread uses the offload while the first one opens."""
    offload = ssdtrain.offload_activations(directory, policy(io_timeout_seconds=FAR))
    trainer = Trainer()
    check_equal(trainer.step(offload), plain_steps(1)[0])
    stick(GROWS, directory)

    def enter_and_leave() -> None:
        with offload:  # a thread that ends inside leaves its hooks to torch, which drops them while the process ends
            pass

    opener = threading.Thread(target=enter_and_leave, daemon=True)
    opener.start()
    for _ in range(20):
        assert offload.stats.num_offloaded > 0
        opener.join(0.01)
    assert opener.is_alive()
    answer()
    opener.join()


def test_the_lock_is_free_while_a_file_is_opened(lab: Lab, tmp_path: Path) -> None:
    lab.run(lock_is_free, tmp_path, seconds=40)


# -- new offloads ------------------------------------------------------------------------------------------------------


def optimizer_on(directory: object, **fields: object) -> torch.optim.Optimizer:
    chosen: dict[str, object] = {"io_timeout_seconds": STUCK_SECONDS, "min_nbytes": 0, **fields}
    inner = torch.optim.AdamW(Trainer().model.parameters())
    return ssdtrain.offload_optimizer(inner, directory, chosen)  # type: ignore[arg-type]


def parameters_on(directory: object, **fields: object) -> torch.nn.Module:
    chosen: dict[str, object] = {"io_timeout_seconds": STUCK_SECONDS, "min_nbytes": 0, **fields}
    return ssdtrain.offload_parameters(Trainer().model, directory, chosen, ["0"])  # type: ignore[arg-type]


def activations_on(directory: object, **fields: object) -> ssdtrain.ActivationOffload:
    return ssdtrain.offload_activations(directory, impatient(**fields))  # type: ignore[arg-type]


MAKERS = {"activations": activations_on, "optimizer": optimizer_on, "parameters": parameters_on}


def refused(directory: str, what: str, letter: str) -> None:
    fields = {"drive_writes_per_day": 1.0} if what == "activations" else {}
    ssdtrain.offload_activations(directory).close()  # imports what is imported late
    before = holdings()
    stick(letter, directory)
    begin = time.monotonic()
    with pytest.raises(OSError, match="no answer from the drive") as caught:
        MAKERS[what](directory, **fields)
    assert time.monotonic() - begin < FAR
    assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, directory)
    del caught
    answer()
    assert eventually(lambda: holdings()[0] <= before[0]), "what came late is closed"
    assert eventually(lambda: holdings()[1] <= before[1]), "and its thread is gone"


@pytest.mark.parametrize(
    "what, letter",
    [
        ("activations", LOOKS),
        ("activations", OPENS),
        ("activations", GROWS),
        ("optimizer", GROWS),
        ("parameters", OPENS),
    ],
)
def test_a_new_offload_on_a_stuck_directory_is_refused_in_time(
    lab: Lab, tmp_path: Path, what: str, letter: str
) -> None:
    """What was opened too late is closed when the drive answers, and its thread is gone."""
    lab.run(refused, tmp_path, what, letter)


def one_of_two(stuck: str, good: str, what: str, letter: str) -> None:
    stick(letter, stuck)
    MAKERS[what]([stuck, good])
    answer()


@pytest.mark.parametrize("what, letter", [("activations", LOOKS + OPENS), ("optimizer", OPENS), ("parameters", GROWS)])
def test_a_new_offload_on_two_directories_takes_the_other(lab: Lab, tmp_path: Path, what: str, letter: str) -> None:
    for name in ("stuck", "good"):
        (tmp_path / name).mkdir()
    lab.run(one_of_two, tmp_path / "stuck", tmp_path / "good", what, letter)


# -- endings -----------------------------------------------------------------------------------------------------------


def ends(directory: str, engine: str, how: str) -> None:
    trainer = Trainer()
    offload = ssdtrain.offload_activations(directory, impatient(engine))
    check_equal(trainer.step(offload), plain_steps(1)[0])
    optimizer = optimizer_on(directory)
    stick(CLOSES + SHORTENS, directory)
    begin = time.monotonic()
    if how == "closed":
        offload.close()
        optimizer.close()  # type: ignore[attr-defined]
    if how == "dropped":
        del offload, optimizer
    assert time.monotonic() - begin < FAR
    if how == "just ends":
        globals()["kept"] = offload, optimizer


@pytest.mark.parametrize("engine", ["threads", "python"])
@pytest.mark.parametrize("how", ["closed", "dropped", "just ends"])
def test_neither_close_nor_the_end_of_the_process_waits(lab: Lab, tmp_path: Path, engine: str, how: str) -> None:
    lab.run(ends, tmp_path, engine, how)


def ends_while_files_are_shortened(directory: str, engine: str) -> None:
    offload = ssdtrain.offload_activations(directory, policy(engine, io_timeout_seconds=3600))
    check_equal(Trainer().step(offload, lambda: stick(SHORTENS, directory)), plain_steps(1)[0])
    cycle: list[object] = [offload]
    cycle.append(cycle)


@every_engine
def test_the_end_of_the_process_does_not_wait_for_threads_that_run_no_more(
    lab: Lab, tmp_path: Path, engine: str
) -> None:
    """Once the interpreter shuts down daemon threads never come back: a script took a minute more to end."""
    lab.run(ends_while_files_are_shortened, tmp_path, engine)


# -- state dicts -------------------------------------------------------------------------------------------------------


def state_dict_on_a_stuck_drive(directory: str, letter: str) -> None:
    model = parameters_on(directory)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    stick(letter, directory)
    with pytest.raises(OSError, match="no answer from the drive") as caught:
        model.state_dict()
    assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, directory)
    answer()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    tell("equal")


@pytest.mark.parametrize("letter", ["o", "g", "m"])
def test_a_state_dict_on_a_stuck_drive_is_an_error_in_time(lab: Lab, tmp_path: Path, letter: str) -> None:
    """And the next one is whole."""
    lab.run(state_dict_on_a_stuck_drive, tmp_path, letter)
