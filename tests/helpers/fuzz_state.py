"""Random programs over parameters and optimizer state: equal to plain training, or an error that names the cause.

    python tests/helpers/fuzz_state.py --count 2000    # prints a seed with every failure, and how to play it again
    python tests/helpers/fuzz_state.py --replay 1234 --shrink  # one program again, and the shortest one that fails too
    python tests/helpers/fuzz_state.py --count 20 --ranks 2   # in DistributedDataParallel on gloo

Each program draws a module, an optimizer, policies and what a user does: steps with accumulation, clipping and
penalties, casts, changes in place, averages, checkpoints, exceptions. It is played plain, then with parameters, state
or both offloaded. Allowed: the same losses, parameters and state to the bit after everything that was done, or an error
that begins with "Expected" and leaves all values as they were before the call that raised it.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import logging
import os
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fuzz_models import BLOCKS, OPTIMIZERS, Toy
from fuzz_user import HABITS, Plain, User

HANG_SECONDS = 300  # a program takes half a second, and minutes where others take all processors
_DTYPES = ["float32"] * 6 + ["float64", "bfloat16"]
_ORDINARY = ["step"] * 4
_LEAST_SHRUNK = 1


@dataclass(frozen=True)
class Program:
    """What is drawn from a seed."""

    seed: int
    blocks: tuple[str, ...]
    dtypes: tuple[str, ...]
    is_tied: bool
    optimizer: str
    num_groups: int
    parameters: dict[str, Any] | None
    """Policy for `offload_parameters`."""
    state: dict[str, Any] | None
    """Policy for `offload_optimizer`."""
    has_activations: bool
    is_shared: bool
    """Whether state goes to the drive of the parameters."""
    is_watched: bool
    """Whether all values are looked at after each action, which changes where they are."""
    actions: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, seed: int, *, is_alone: bool = True) -> Program:
        draw = random.Random(seed)
        num_blocks = draw.randint(1, 4)
        has_parameters, has_state = draw.choice([(True, True), (True, True), (True, False), (False, True)])
        tight = {
            "staging_nbytes": draw.choice(["64KiB", "128KiB"]),
            "engine": draw.choice(["threads", "auto", "python"]),
        }
        late = {"update_on": "cpu", "delayed_update": True}  # which needs an accelerator, and says so
        modes: list[dict[str, Any]] = [{}, {}, {}, {}, {"update_on": "cpu"}, {"update_on": "cpu"}, late]
        if is_alone:
            modes += 2 * [{"step_in_backward": True}, {"offload_gradients": True}]
        mode = draw.choice(modes)
        habits = [name for name in HABITS if is_alone or name in _FOR_RANKS]
        return cls(
            seed,
            tuple(draw.choice(list(BLOCKS)) for _ in range(num_blocks)),
            tuple([draw.choice(_DTYPES)] * num_blocks) if draw.random() < 0.8 else _several(draw, num_blocks),
            is_tied=draw.random() < 0.3,
            optimizer=draw.choice(list(OPTIMIZERS)),
            num_groups=draw.choice([1, 1, 2]),
            parameters=tight | {"min_nbytes": draw.choice([0, 512]), "prefetch_nbytes": draw.choice([0, 4096, "1MiB"])}
            if has_parameters
            else None,
            state=tight | mode | {"min_nbytes": draw.choice([0, 512]), "chunk_nbytes": draw.choice([1, 2048, 16384])}
            if has_state
            else None,
            has_activations=draw.random() < 0.25,
            is_shared=draw.random() < 0.5,
            is_watched=draw.random() < 0.5,
            actions=(("step", draw.randrange(1000)),)
            + tuple((draw.choice(_ORDINARY + habits), draw.randrange(1000)) for _ in range(draw.randint(3, 9)))
            + (("step", draw.randrange(1000)),),
        )


_FOR_RANKS = {"step", "state dicts", "scheduler", "gathered edit", "read norms", "data edit"}


def _several(draw: random.Random, num: int) -> tuple[str, ...]:
    return tuple(draw.choice(_DTYPES) for _ in range(num))


# -- playing and judging -----------------------------------------------------------------------------------------------


class WrongError(AssertionError):
    """A program that was neither equal nor refused with a reason."""


def make_model(program: Program) -> torch.nn.Module:
    torch.manual_seed(program.seed)
    dtypes = [getattr(torch, name) for name in program.dtypes]
    model = Toy(program.blocks, dtypes, is_tied=program.is_tied)
    if dist.is_initialized():
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    return model


def judge(program: Program, folder: str) -> str:
    """Plays it plain and offloaded; how it ended: ``"equal"``, ``"refused: ..."``.

    Raises:
        WrongError: it ended in another way.
    """
    plain = Plain(program, make_model(program))
    states, raised = [plain.everything()], None
    for action in program.actions:
        raised = _attempt(plain, action)
        states.append(plain.everything())
        if raised is not None:
            break
    try:
        user: Plain = User(program, make_model(program), folder)
    except Exception as error:
        return _refused(error, "offloading")
    try:
        for i, action in enumerate(program.actions):
            where = f"action {i}, {action[0]} {action[1]}"
            error = _attempt(user, action)
            is_last = i + 2 == len(states) and raised is not None
            if error is not None and not is_last:
                kind = _refused(error, where)
                if not (user.is_incomplete or user.acts_in_backward):  # which has changed something before anybody asks
                    _compare(user, states[i], f"after the error of {where} ({error})", has_buffers=False)
                return kind
            if is_last:
                if error is None:
                    raise WrongError(f"{where}: plain raised {raised!r}, this did not")
                return "equal error"
            if user.is_incomplete:
                continue
            _compare_seen(user.seen, states[i + 1]["seen"], where)
            if program.is_watched:
                _compare(user, states[i + 1], f"after {where}")
        if user.is_incomplete:  # and nobody asked since
            try:
                user.optimizer.state_dict()
            except Exception as error:
                return _refused(error, "state_dict()")
        _compare(user, states[-1], "at the end")
        user.close()
        _compare(user, states[-1], "after close")
    finally:
        user.abandon()
    return "equal"


def _attempt(user: Plain, action: tuple[str, int]) -> Exception | None:
    try:
        user.do(*action)
    except Exception as error:
        return error
    return None


def _refused(error: Exception, where: str) -> str:
    if not str(error).startswith("Expected"):
        raise WrongError(f"{where}: {type(error).__name__}, which names no cause: {error}") from error
    return "refused: " + re.sub(r"[\d.]+", "#", str(error))[:60]


def _compare(user: Plain, expected: dict[str, Any], where: str, *, has_buffers: bool = True) -> None:
    """Without buffers where a forward was: it changes them, and then there was an error."""
    try:
        found = user.everything()
    except Exception as error:
        raise WrongError(f"{where}: what there is cannot be looked at: {type(error).__name__}: {error}") from error
    for part in ("model", "optimizer", "seen") if has_buffers else ("parameters", "optimizer"):
        difference = difference_of(found[part], expected[part], part)
        if difference:
            raise WrongError(f"{where}: {difference}")


def _compare_seen(found: list[Any], expected: list[Any], where: str) -> None:
    difference = difference_of(found, expected, "seen")
    if difference:
        raise WrongError(f"{where}: {difference}")


def difference_of(found: Any, expected: Any, name: str) -> str:
    """Where two nests of tensors and values differ; empty where nowhere, to the bit."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
            return f"{name}: expected {expected.dtype} {list(expected.shape)}, got {type(found).__name__} {found}"[:300]
        same = found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8)
        if expected.numel() and not torch.equal(*same):
            has_nan = bool(found.isnan().any()) and not bool(expected.isnan().any())
            return f"{name}: {'NaN that plain does not have' if has_nan else 'other values'}"
        return ""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or set(found) != set(expected):
            return f"{name}: expected keys {list(expected)}, got {list(found) if isinstance(found, dict) else found}"
        return next(filter(None, (difference_of(found[k], v, f"{name}.{k}") for k, v in expected.items())), "")
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{name}: expected {len(expected)}, got {len(found)}"
        both = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (difference_of(a, b, f"{name}[{i}]") for i, (a, b) in both)), "")
    if found != expected and not (found != found and expected != expected):
        return f"{name}: expected {expected!r}, got {found!r}"
    return ""


# -- the shortest program that fails -----------------------------------------------------------------------------------


def shrunk(program: Program, folder: str, reason: Exception) -> tuple[Program, Exception]:
    """Leaves out what can be left out so that it still fails."""
    is_shorter = True
    while is_shorter:
        is_shorter = False
        for candidate in _shorter(program):
            try:
                judge(candidate, folder)
            except WrongError as error:
                program, is_shorter, reason = candidate, True, error
                break
            except Exception:
                continue
    return program, reason


def _shorter(program: Program) -> Any:
    change = dataclasses.replace
    if not program.is_watched:
        yield change(program, is_watched=True)
    for i in range(len(program.actions)):
        if len(program.actions) > _LEAST_SHRUNK:
            yield change(program, actions=program.actions[:i] + program.actions[i + 1 :])
    for i in range(len(program.blocks)):
        if len(program.blocks) > 1:
            blocks, dtypes = list(program.blocks), list(program.dtypes)
            del blocks[i], dtypes[i]
            yield change(program, blocks=tuple(blocks), dtypes=tuple(dtypes))
    if program.blocks != ("mlp",) * len(program.blocks):
        yield change(program, blocks=("mlp",) * len(program.blocks))
    for name, simple in {
        "is_tied": False, "num_groups": 1, "has_activations": False, "is_shared": False, "parameters": None,
        "state": None, "optimizer": "adamw", "dtypes": ("float32",) * len(program.blocks),
    }.items():  # fmt: skip
        if getattr(program, name) != simple and not (
            (name == "state" and program.parameters is None) or (name == "parameters" and program.state is None)
        ):
            yield change(program, **{name: simple})


# -- the command -------------------------------------------------------------------------------------------------------


def play(seeds: Any, folder: str, *, stops: bool, is_alone: bool = True, shrinks: bool = False) -> int:
    """Plays programs in order; how many failed."""
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for num, seed in enumerate(seeds, start=1):
        program = Program.draw(seed, is_alone=is_alone)
        print(seed, file=sys.stderr, flush=True)  # the last before a traceback is that of the program that hung
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            outcomes[judge(program, folder)] += 1
        except Exception as error:
            if not isinstance(error, WrongError):
                traceback.print_exc()
            if not program.is_watched and isinstance(error, WrongError):  # where it began
                try:
                    judge(dataclasses.replace(program, is_watched=True), folder)
                except WrongError as watched:
                    error = watched
            failures[_kind_of(error)] += 1
            print(f"FAILED, play again with --replay {seed}: {error}"[:600], flush=True)
            if shrinks:
                faulthandler.cancel_dump_traceback_later()
                program, error = shrunk(program, folder, error)
                print(f"shrunk to {program}\n  {error}"[:1200], flush=True)
            if stops:
                break
        faulthandler.cancel_dump_traceback_later()
        if num % 100 == 0:
            print(f"{num} programs, {sum(failures.values())} failures", flush=True)
    for kind, count in outcomes.most_common():
        print(f"{count:5} {kind}")
    for kind, count in failures.most_common():
        print(f"{count:5} FAILED {kind}")
    if not failures:
        print(f"{sum(outcomes.values())} programs, nothing wrong")
    return sum(failures.values())


def _kind_of(error: BaseException) -> str:
    return re.sub(r"\d+", "#", str(error))[:90]


def play_rank(rank: int, world_size: int, store: str, seeds: list[int], folder: str) -> None:
    """In one process of a job."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        quiet()
        if play(seeds, folder, stops=True, is_alone=False):
            sys.exit(1)
    finally:
        dist.destroy_process_group()


def quiet() -> None:
    """One computing thread, and no remarks."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")
    parser.add_argument("--replay", type=int, nargs="*", help="these only")
    parser.add_argument("--shrink", action="store_true", help="look for the shortest program that fails too")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a job")
    parser.add_argument("--directory", help="where to spill; default: a temporary directory")
    options = parser.parse_args()
    seeds = options.replay or list(range(options.seed, options.seed + options.count))
    quiet()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        if options.ranks > 1:
            store = str(Path(folder) / "store")
            spill = Path(folder) / "spill"
            spill.mkdir()
            arguments = (options.ranks, store, seeds, str(spill))
            torch.multiprocessing.spawn(play_rank, arguments, options.ranks)
            return 0
        return int(play(seeds, folder, stops=options.stop, shrinks=options.shrink) > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
