"""One training run in a process of its own: reads commands from stdin, one JSON a line, and answers each.

Started by `process.WorkerProcess`. The first line is the job; then come
"warm_up", "step" and "finish". Answers leave on the original stdout, which nothing else can write to; errors
are answers too.

[Note: the warm-up step] The first step creates the gradients and AdamW's state and is slow for reasons that
have nothing to do with offloading, so it is not timed. The plain run counts its saved tensors in that step
only: its timed steps run without a single hook.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssdtrain import ActivationOffload, offload_activations
from ssdtrain.devices.vector_math import settle_vector_math
from ssdtrain.tools.demo.memory import MemoryLimit, PeakResident, PeakSampler, is_out_of_memory
from ssdtrain.tools.demo.model import GPT, GPTConfig
from ssdtrain.tools.demo.saved_counter import SavedTensorCounter
from ssdtrain.tools.demo.settings import DemoSettings
from ssdtrain.tools.demo.text import Text, read_text

_PR_SET_PDEATHSIG = 1


class Channel:
    """The pipe to the parent, kept apart from stdout so that no library's print can get into it."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(self, event: str, **values: Any) -> None:
        """Sends one answer."""
        self._answers.write(json.dumps({"event": event, **values}, default=_plain) + "\n")
        self._answers.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yields what the parent sends, until it closes the pipe."""
        for line in iter(sys.stdin.readline, ""):
            yield json.loads(line)


@dataclass(frozen=True)
class Job:
    """What the parent asks this process to do."""

    role: str
    """`plain` or `ssdtrain`."""
    settings: DemoSettings
    """What to train."""
    memory_limit_nbytes: int | None
    """Private memory the run may add to what it has before its first step; None is no limit."""
    measures_private_memory: bool
    """Whether to sample the private memory, which `memory_limit_nbytes` is about."""

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Job:
        """Reads a job from the first line of stdin."""
        return cls(**{**message, "settings": DemoSettings.from_dict(message["settings"])})


class Trainer:
    """Model, optimizer and text; takes one step at a time. It knows nothing of offloading."""

    def __init__(self, settings: DemoSettings) -> None:
        self._settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        settle_vector_math()  # this run and the other one are compared to the bit
        torch.manual_seed(settings.seed)
        self._text = Text(read_text(settings.data), seed=settings.seed)
        shape = GPTConfig(settings.layers, settings.width, settings.heads, settings.sequence)
        self.model = GPT(shape)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self._num_steps = 0

    def step(self) -> float:
        """Takes one optimizer step on the next batch and returns its loss."""
        size, sequence = self._settings.batch, self._settings.sequence
        tokens, targets = self._text.batch(self._num_steps, size=size, sequence=sequence)
        loss = self.model(tokens, targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._num_steps += 1
        return float(loss.item())

    def parameters_sha256(self) -> str:
        """Hashes the bytes of all parameters in order."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            nbytes = parameter.numel() * parameter.element_size()
            digest.update((ctypes.c_char * nbytes).from_address(parameter.data_ptr()))
        return digest.hexdigest()


class Run:
    """A trainer with or without offloading, and the measurements round it."""

    def __init__(self, job: Job) -> None:
        self.trainer = Trainer(job.settings)
        self._role = job.role
        self._counter: SavedTensorCounter | None = None
        self._resident = PeakResident()
        self._private = PeakSampler("VmData") if job.measures_private_memory else None
        self._limit = None if job.memory_limit_nbytes is None else MemoryLimit(job.memory_limit_nbytes)
        self._offload: ActivationOffload | None = None

    def offloading(self, settings: DemoSettings) -> AbstractContextManager[Any]:
        """Returns the context that all steps run in."""
        if self._role == "plain":
            return nullcontext()
        self._offload = offload_activations(settings.directory, policy=settings.policy, model=self.trainer.model)
        return self._offload

    def warm_up(self) -> dict[str, Any]:
        """Takes the first step; see [Note: the warm-up step]."""
        if self._role != "plain":
            return self.step()
        self._counter = SavedTensorCounter(self.trainer.model.parameters())
        with self._counter:
            return self.step()

    def step(self) -> dict[str, Any]:
        """Takes a step and returns its loss, exactly, and its seconds."""
        start = time.perf_counter()
        loss = self.trainer.step()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": loss.hex(), "so_far": self._so_far()}

    def _so_far(self) -> dict[str, Any]:
        """What can be told without slowing the next step down; for who watches."""
        if self._offload is None:
            return {"peak_saved_nbytes": self._peak_saved_nbytes()}
        stats = self._offload.stats
        names = ("peak_memory_nbytes", "written_nbytes", "read_nbytes", "stall_seconds", "plan")
        so_far = {name: getattr(stats, name) for name in names}
        return so_far | {"peak_saved_nbytes": so_far["peak_memory_nbytes"]}

    def finish(self) -> dict[str, Any]:
        """Returns everything measured over the run and a hash of what was learned."""
        stats = {} if self._offload is None else vars(self._offload.stats)
        sha256 = self.trainer.parameters_sha256()
        return {**self.measurements(), "stats": stats, "parameters_sha256": sha256}

    def measurements(self) -> dict[str, Any]:
        """Returns the peaks so far, and the size of the model."""
        private = self._private
        return {
            "peak_rss_nbytes": self._resident.nbytes(),
            "peak_saved_nbytes": self._peak_saved_nbytes(),
            "num_parameters": sum(parameter.numel() for parameter in self.trainer.model.parameters()),
            "peak_private_nbytes": private and private.peak_nbytes - private.start_nbytes,
        }

    def lift_limit(self) -> None:
        """Takes the memory limit away, if there is one."""
        if self._limit is not None:
            self._limit.lift()

    def _peak_saved_nbytes(self) -> int | None:
        if self._offload is not None:
            return int(self._offload.stats.peak_memory_nbytes)
        return None if self._counter is None else self._counter.peak_nbytes


def main() -> int:
    """Serves the parent until it closes the pipe or something fails."""
    faulthandler.enable()
    _die_with_parent()
    channel = Channel()
    job = Job.from_message(next(channel.messages()))
    with ExitStack() as stack:
        try:
            run = Run(job)
            stack.enter_context(run.offloading(job.settings))
        except (OSError, ValueError, RuntimeError) as error:
            return _fail(channel, "usage", error)
        try:
            _serve(run, channel)
        except BaseException as error:  # whatever it is, the parent is told; the traceback goes to stderr
            run.lift_limit()
            return _fail(channel, "failure", error, **run.measurements())
    return 0


def _serve(run: Run, channel: Channel) -> None:
    actions = {"warm_up": run.warm_up, "step": run.step, "finish": run.finish}
    channel.send("ready")
    for message in channel.messages():
        command = message["command"]
        channel.send(command, **actions[command]())
        if command == "finish":
            return


def _fail(channel: Channel, kind: str, error: BaseException, **measurements: Any) -> int:
    traceback.print_exception(error)
    kind = "out_of_memory" if is_out_of_memory(error) else kind
    channel.send("error", kind=kind, message=str(error) or type(error).__name__, measurements=measurements)
    return 1


def _plain(value: Any) -> dict[str, Any]:
    """Turns what JSON does not know, the read-only mappings and dataclasses of `Stats`, into dicts."""
    return dict(value) if isinstance(value, Mapping) else asdict(value)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
