"""One method of the comparison in a process of its own: a step per line of stdin, an answer per line of stdout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from typing import Any

import torch
from compare_methods import METHODS, UNHOOKED, Setting, UnavailableError, remark_on
from compare_models import MODELS, Size, batch_of

from ssdtrain.devices.vector_math import settle_vector_math
from ssdtrain.tools.demo.memory import PeakResident
from ssdtrain.tools.demo.saved_counter import SavedTensorCounter


class Training:
    """A model under one method."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._name, self._size = job["model"], Size(**job["size"])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settle_vector_math()  # methods are compared to the bit
        torch.manual_seed(0)
        self.model = MODELS[self._name](self._size).to(self._device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self._counts = job["method"] in UNHOOKED
        self._counter: SavedTensorCounter | None = None
        self.context = METHODS[job["method"]](Setting(self.model, job["directory"], job["policy"]))
        self._number = 0
        self._resident = PeakResident()
        self._losses: list[str] = []

    def step(self) -> dict[str, Any]:
        """One step; the first counts saved tensors where nothing else is hooked in."""
        batch = batch_of(self._name, self._size, self._number, self._device)
        counter = contextlib.nullcontext()
        if self._counts and self._number == 0:
            counter = self._counter = SavedTensorCounter(self.model.parameters())
        begin = time.perf_counter()
        with counter:
            loss = self.model(batch)
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._losses.append(loss.item().hex())
        self._number += 1
        return {"seconds": time.perf_counter() - begin}

    def settle(self) -> dict[str, Any]:
        """Peaks of memory count from now on."""
        self._resident.forget()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {}

    def finish(self) -> dict[str, Any]:
        """Peaks, and what was learned."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else self._resident.nbytes()
        stats = getattr(self.context, "stats", None)
        saved = stats.peak_saved_nbytes if stats is not None else self._counter.peak_nbytes if self._counter else None
        written = stats.written_nbytes if stats is not None else 0
        learned = [*self._losses, digest.hexdigest()]
        return {"peak_nbytes": peak, "peak_saved_nbytes": saved, "written_nbytes": written, "learned": learned}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    try:
        training = Training(job)
    except UnavailableError as error:
        answer(unavailable=str(error))
        return
    answer(remark=remark_on(job["method"]))
    commands = {"step": training.step, "settle": training.settle, "finish": training.finish}
    with training.context:
        for line in sys.stdin:
            answer(**commands[line.strip()]())


if __name__ == "__main__":
    main()
