"""Which engine this machine can run: io_uring and threads (C++), kvikio, or plain Python.

The only file that imports them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from ssdtrain.io import kvikio, python
from ssdtrain.io.engine import Engine, Fence, SpillFile
from ssdtrain.io.extension import UnavailableError, extension
from ssdtrain.io.kvikio import GpuDirect
from ssdtrain.io.kvikio import probe as gpudirect
from ssdtrain.io.timed_calls import TimedCall, no_answer, run, run_all
from ssdtrain.policy import size_text

KINDS = ("auto", "io_uring", "threads", "python", "kvikio")
_ANYWHERE = ("io_uring", "threads", "python")
_CPP_KINDS = ("io_uring", "threads")
_PAGE = 4096
_NUM_SLABS = 16
_MAX_SLAB_NBYTES = 4 << 20
_ADDRESSES_NBYTES, _LEAST_ADDRESSES_NBYTES = 1 << 40, 64 << 20  # of a host tier that grows with the memory there is

__all__ = [
    "KINDS",
    "EngineChoice",
    "GpuDirect",
    "close_files",
    "cuda_driver",
    "driver_type",
    "fence",
    "gpudirect",
    "io_uring_problem",
    "open_engine",
    "slab_nbytes_for",
]


@dataclass(frozen=True)
class EngineChoice:
    """An open engine, its files and why it is this one."""

    engine: Engine
    files: Sequence[SpillFile]
    kind: str
    reason: str
    fallbacks: list[str] = field(default_factory=list)
    host_nbytes: int = 0
    """Limit of the host tier, for which it has addresses; 0 where the engine has none."""
    has_checksum: bool = False
    """Whether every byte that is read from a file is verified."""
    is_shared: bool = False
    """Whether another user may join."""
    timeout_seconds: float = 60.0
    """How long a drive is waited for when it opens, grows, shortens or closes a file."""
    keeps_files: bool = False
    """Whether the files outlive the engine: they are whoever's that opened it."""
    takes_half: bool = False
    """Whether the host tier holds at most half of what is free, too."""

    def shortcomings(self) -> list[str]:
        """Sentences on what works, but not the best way."""
        texts = list(self.engine.notes)
        for file in self.files:
            reasons = [] if file.is_direct else [file.direct_reason]
            texts += [f"{file.directory}: {why}" for why in (*reasons, file.fallocate_reason) if why]
        return list(dict.fromkeys(texts))

    def close(self) -> list[str]:
        """Ends the engine and gives the spill space back; directories whose drive gave no answer."""
        self.engine.close()
        return [] if self.keeps_files else close_files(self.files, self.timeout_seconds)

    def discard(self) -> None:
        """Ends the engine, and closes the files whoever's they are, without waiting for it."""
        self.engine.close()
        close_files(self.files, 0.0)


@dataclass(frozen=True)
class _Request:
    locations: Sequence[str | SpillFile]
    staging_nbytes: int
    slab_nbytes: int
    checksum: bool
    disk_nbytes: int | None
    host_nbytes: int | None
    is_shared: bool
    timeout_seconds: float
    first_staging_nbytes: int = 0

    def files(self, make: Callable[[str, int | None, int], SpillFile]) -> list[SpillFile]:
        """The files as they are, or one new file per directory, which share `disk_nbytes` evenly.

        Another user's files follow; how long they may be is for that one to say.

        Raises:
            OSError: a file cannot be made, or not in time (ETIMEDOUT); the directory is the `filename`.
        """
        cap = None if self.disk_nbytes is None else self.disk_nbytes // len(self.locations)
        others = [location for location in self.locations if isinstance(location, str)] if self.is_shared else []
        wanted = [(location, cap, 0) for location in self.locations] + [(location, None, 1) for location in others]
        made: list[SpillFile | TimedCall[SpillFile]] = [
            TimedCall(partial(make, location, most, user), _close) if isinstance(location, str) else location
            for location, most, user in wanted
        ]
        deadline = time.monotonic() + self.timeout_seconds
        try:
            for i, (location, _, _) in enumerate(wanted):
                timed = made[i]
                if isinstance(timed, TimedCall):
                    if not timed.wait(deadline - time.monotonic()):
                        raise no_answer("a spill file", self.timeout_seconds, str(location))
                    made[i] = timed.take()
        except BaseException:
            for one in made:
                if isinstance(one, TimedCall):
                    one.abandon()
            self.give_up([one for one in made if not isinstance(one, TimedCall)], 0.0)
            raise
        return cast(list[SpillFile], made)

    def give_up(self, files: Sequence[SpillFile], timeout_seconds: float) -> None:
        """Closes those of `files` that are new."""
        close_files([file for file in files if file not in self.locations], timeout_seconds)


def close_files(files: Sequence[SpillFile], timeout_seconds: float) -> list[str]:
    """Closes files in the background; the directories of those that are not closed in time."""
    timed_calls = run_all([file.close for file in files], timeout_seconds)
    return [file.directory for file, timed in zip(files, timed_calls, strict=True) if not timed.wait(0.0)]


def _close(what: Any) -> None:
    what.close()


def slab_nbytes_for(staging_nbytes: int) -> int:
    """Size of a slab: whole pages, small enough that several are under way, large enough for a fast request."""
    return max(_PAGE, min(_MAX_SLAB_NBYTES, staging_nbytes // _NUM_SLABS) // _PAGE * _PAGE)


def open_engine(
    kind: str,
    files_or_directories: Sequence[str | SpillFile],
    staging_nbytes: int,
    slab_nbytes: int,
    checksum: bool = False,
    disk_nbytes: int | None = None,
    *,
    host_nbytes: int | None = 0,
    device_index: int | None = None,
    is_shared: bool = False,
    timeout_seconds: float = 60.0,
    keeps_files: bool = False,
    first_staging_nbytes: int = 0,
) -> EngineChoice:
    """Opens the engine asked for, or with ``"auto"`` the best that works here, on files or on new files.

    Args:
        kind: one of `KINDS`. ``"auto"``: io_uring, threads, python, or kvikio where GPUDirect is measured to be faster.
        files_or_directories: open spill files of the engine's own kind, or directories; none with a host tier only.
        staging_nbytes: most memory for slabs.
        slab_nbytes: size of a slab, a multiple of 4096.
        checksum: verify every byte that is read from a file.
        disk_nbytes: bound on all files together; None for no bound.
        host_nbytes: limit of the host tier; 0 for none. None, without a directory: half of what is free.
        device_index: the GPU whose memory is offloaded; None for host memory.
        is_shared: another user may join later: it gets files of its own, in the same directories.
        timeout_seconds: how long a drive is waited for.
        keeps_files: the files outlive the engine.
        first_staging_nbytes: what of the staging is used until it grows; 0 for all.

    Raises:
        ValueError: `kind` is unknown, or the sizes do not fit together.
        OSError: a directory cannot hold a spill file, or its drive does not answer (ETIMEDOUT).
        RuntimeError: the engine asked for by name does not work here.
    """
    _check_kind(kind)
    locations = list(files_or_directories)
    request = _Request(
        locations, staging_nbytes, slab_nbytes, checksum, disk_nbytes, host_nbytes, is_shared, timeout_seconds
    )
    request = replace(request, first_staging_nbytes=first_staging_nbytes)
    if not request.locations:
        return _open_without_files(request)
    names, preference = _names(kind, request, device_index)
    refused: dict[str, list[str]] = {}
    for name in names:
        try:
            engine, files = _open(name, request)
        except UnavailableError as unavailable:
            _give_up_if_named(kind, unavailable)
            refused.setdefault(str(unavailable), []).append(name)
            continue
        fallbacks = [_not_available(names, why) for why, names in refused.items()]
        reasons = ["asked for by name"] if kind == name else fallbacks or ["the fastest, and it works here"]
        if isinstance(engine, kvikio.KvikioEngine) and not preference:
            preference = engine.gpudirect.sentence
        reason = "; ".join(filter(None, [*reasons, preference]))
        return _chosen(request, name, engine, files, reason, fallbacks, keeps_files=keeps_files)
    raise AssertionError("the python engine is always available")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"Expected an engine among {', '.join(KINDS)}, got {kind!r}")


def _chosen(
    request: _Request,
    name: str,
    engine: Engine,
    files: list[SpillFile],
    reason: str,
    fallbacks: list[str],
    *,
    keeps_files: bool,
) -> EngineChoice:
    """An open engine with what the others could not do, and what it cannot."""
    host_nbytes = engine.host_nbytes
    if request.host_nbytes and not host_nbytes:
        fallbacks.append(f"host_nbytes={request.host_nbytes}: engine {name} has no host tier, all goes to the drive")
    has_checksum, is_shared = request.checksum, request.is_shared
    seconds = request.timeout_seconds
    return EngineChoice(
        engine, files, name, reason, fallbacks, host_nbytes, has_checksum, is_shared, seconds, keeps_files
    )


def _names(kind: str, request: _Request, device_index: int | None) -> tuple[tuple[str, ...], str]:
    """The engines to try in turn, and why kvikio is among the automatic ones or not."""
    if kind != "auto":
        return (kind,), ""
    directories = tuple(location for location in request.locations if isinstance(location, str))
    if device_index is None or len(directories) < len(request.locations):
        return _ANYWHERE, ""
    is_better, why = kvikio.pays(directories, device_index, open_engine)
    return (("kvikio", *_ANYWHERE), why) if is_better else (_ANYWHERE, f"kvikio is not preferred: {why}")


def _open_without_files(request: _Request) -> EngineChoice:
    """Threads that copy, and no file: which kind the user asked for does not matter."""
    try:
        engine, files = _open("threads", request)
    except UnavailableError as error:
        raise RuntimeError(f"Expected the C++ engine for a host tier, got: {error}; or pass a directory") from error
    reason = "no directory: pinned host memory only"
    takes_half = request.host_nbytes is None
    limit = engine.host_nbytes
    is_shared = request.is_shared
    return EngineChoice(
        engine, files, "host", reason, [], limit, has_checksum=True, is_shared=is_shared, takes_half=takes_half
    )


def _not_available(names: Sequence[str], why: str) -> str:
    which = f"engine {names[0]} is" if len(names) == 1 else f"engines {' and '.join(names)} are"
    return f"{which} not available: {why}"


def _give_up_if_named(kind: str, unavailable: UnavailableError) -> None:
    if kind == "auto":
        return
    if isinstance(unavailable.__cause__, OSError) and "staging_nbytes=" in str(unavailable):
        raise unavailable.__cause__
    others = " or ".join(f"engine={name!r}" for name in KINDS[1:] if name != kind)
    raise RuntimeError(
        f"Expected engine {kind!r} to be available, got: {unavailable}; use engine='auto' or {others}"
    ) from unavailable


def _open(name: str, request: _Request) -> tuple[Engine, list[SpillFile]]:
    make_file: Any
    make: Any
    if name == "python":
        make_file, make = python.SpillFile, python.PythonEngine
    elif name == "kvikio":
        make_file, make = kvikio.SpillFile, kvikio.KvikioEngine
    else:
        module = extension()
        make_file = module.SpillFile
        engine = partial(module.Engine, name, first_staging_nbytes=request.first_staging_nbytes)
        make = partial(_with_host_tier, engine, request.host_nbytes)
    files = request.files(make_file)
    open_on = partial(make, files, request.staging_nbytes, request.slab_nbytes, request.checksum)
    first = files[0].directory if files else ""  # which is tried out
    try:
        return run(open_on, request.timeout_seconds, first, f"an engine {name}", undo=_close), files
    except TimeoutError:
        request.give_up(files, 0.0)
        raise
    except (OSError, RuntimeError, TypeError) as error:
        request.give_up(files, request.timeout_seconds)
        reason = _without_memory(error, request.staging_nbytes) or error
        if name == "python":
            raise reason from None
        raise UnavailableError(str(reason)) from reason


def _without_memory(error: Exception, staging_nbytes: int) -> OSError | None:
    """The error in the name of the field, where there is no memory for staging."""
    if not isinstance(error, OSError) or error.errno != errno.ENOMEM or "staging" not in str(error):
        return None
    return OSError(errno.ENOMEM, f"staging_nbytes={size_text(staging_nbytes)}: {os.strerror(errno.ENOMEM)}; lower it")


def _with_host_tier(make: Callable[..., Engine], host_nbytes: int | None, *args: Any) -> Engine:
    """An engine with a host tier of so many bytes, or with as many addresses for one as the system gives."""
    wanted = _ADDRESSES_NBYTES if host_nbytes is None else host_nbytes
    while True:
        try:
            return make(*args, host_nbytes=wanted)
        except OSError as error:
            if host_nbytes is not None or error.errno != errno.ENOMEM or wanted <= _LEAST_ADDRESSES_NBYTES:
                raise
            wanted //= 2


def cuda_driver(index: int) -> Any:
    """What engine threads copy with on CUDA device `index`.

    Raises:
        RuntimeError: the extension is not built, or there is no CUDA driver.
    """
    try:
        return extension().CudaDriver(index)
    except UnavailableError as error:
        raise RuntimeError(str(error)) from error


def driver_type() -> Any:
    """What a driver written in Python derives from; `object` without the extension, which alone calls drivers."""
    try:
        return extension().DeviceDriver
    except UnavailableError:
        return object


def fence(driver: Any, stream: int) -> Fence | None:
    """The point that `stream` has come to: a `Fence`, or None where there is no driver, for host memory."""
    made: Fence | None = None if driver is None else extension().Fence(driver, stream)
    return made


def io_uring_problem(directory: str) -> str | None:
    """Why this process cannot use io_uring on `directory`; None when it can."""
    try:
        open_engine("io_uring", [directory], 1 << 20, 1 << 16).close()
    except (OSError, RuntimeError) as error:
        return str(error.__cause__ or error)
    return None
