"""Trainers, the real ones, on the CPU with gloo: equal to the bit with everything offloaded, and nothing left behind.

The cases run in few child processes, one or two ranks each, because importing a trainer takes seconds; see
`trainers_hf.py`, `trainers_accelerate.py` and `trainers_lightning.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import JOBS, ROOT

LIMIT_SECONDS = 600

# By trainer and number of ranks: the cases of `trainers_<trainer>.py`.
CASES = {
    ("hf", 1): """everything directory_of_a_rank resumed_both_ways raised_anywhere gradients_away step_in_backward lora
        other_offloaders refused_on_every_rank threads_of_dataparallel axolotl_plugin swift_callback recipe
        checkpointing""".split(),
    ("hf", 2): "everything directory_of_a_rank resumed_both_ways not_with_replicas lora refused_on_every_rank".split(),
    ("accelerate", 1): """everything saved_and_resumed raised_in_the_middle step_in_backward
        refused_on_every_rank recipe""".split(),
    ("accelerate", 2): "everything saved_and_resumed refused_on_every_rank".split(),
    ("lightning", 1): """everything saved_and_resumed raised_anywhere step_in_backward refused_on_every_rank
        fabric recipe""".split(),
    ("lightning", 2): "everything saved_and_resumed refused_on_every_rank".split(),
    ("trl", 1): ["trl_sft_with_lora", "trl_own_switch"],
    ("trl", 2): ["trl_sft_with_lora"],
    ("sentence_transformers", 1): ["cached_loss", "everything"],
    ("sentence_transformers", 2): ["everything"],
}
MODULES = {"trl": "hf", "sentence_transformers": "sentence"}  # whose cases are in a file of another name


def run_job(folder: Path, trainer: str, num_ranks: int) -> list[dict[str, str]]:
    """What went wrong in each case, by rank; empty texts where nothing did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    command = [
        sys.executable,
        JOBS / "trainers_worker.py",
        f"trainers_{MODULES.get(trainer, trainer)}",
        folder,
        folder / "results",
    ]
    children = []
    for rank in range(num_ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks, "WORLD_SIZE": num_ranks}
        chosen = common | (own if num_ranks > 1 else {})  # a single one is started without torchrun
        environment = os.environ | {name: str(value) for name, value in chosen.items()}
        with open(folder / f"output.{rank}", "w") as output:
            children.append(
                subprocess.Popen([*command, *CASES[trainer, num_ranks]], env=environment, stdout=output, stderr=output)
            )
    try:
        for child in children:
            child.wait(LIMIT_SECONDS)
    finally:
        for child in children:
            child.kill()
            child.wait()
    outputs = [(folder / f"output.{rank}").read_text() for rank in range(num_ranks)]
    assert [child.returncode for child in children] == [0] * num_ranks, "\n".join(text[-3000:] for text in outputs)
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in range(num_ranks)]


Results = list[dict[str, str]]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Results]:
    """Runs a job when it is asked for first. A fixture with the job as its parameter would run it for every case:
    pytest tears such a one down when the next test has another set of parameters."""
    found: dict[tuple[str, int], Results | Exception] = {}

    def results(trainer: str, num_ranks: int) -> Results:
        package = {"hf": "transformers"}.get(trainer, trainer)
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make test` installs what its tests need")
        job = trainer, num_ranks
        if job not in found:
            try:
                found[job] = run_job(tmp_path_factory.mktemp(f"{trainer}{num_ranks}"), *job)
            except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
                found[job] = error
        result = found[job]
        if isinstance(result, Exception):
            raise result
        return result

    return results


@pytest.mark.parametrize(
    "trainer, num_ranks, case", [(*job, case) for job in CASES for case in CASES[job]],
    ids=[f"{trainer}-{num_ranks}-{case}" for trainer, num_ranks in CASES for case in CASES[trainer, num_ranks]],
)  # fmt: skip
def test_trainer(results_of: Callable[[str, int], Results], trainer: str, num_ranks: int, case: str) -> None:
    for rank, found in enumerate(results_of(trainer, num_ranks)):
        assert found.get(case, "not reached") == "", f"rank {rank}: {found.get(case)}"
