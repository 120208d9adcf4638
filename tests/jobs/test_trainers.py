"""Trainers, the real ones, on the CPU with gloo: equal to the bit with everything offloaded, and nothing left behind.

The cases run in few child processes, one or two ranks each, because importing a trainer takes seconds; see
`trainers_hf.py`, `trainers_accelerate.py`, `trainers_lightning.py`; `trainers_compiled.py` and `trainers_combined.py`
use several of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import JOBS, ROOT
from forks import Forks, ranks

COMMON = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "1",
}
IMPORTED = ["transformers.trainer", "accelerate", "lightning"]

# By trainer and number of ranks: the cases of `trainers_<trainer>.py`.
CASES = {
    ("hf", 1): """everything directory_of_a_rank resumed_both_ways raised_anywhere gradients_away step_in_backward lora
        trained_twice batch_size_that_fits compiled
        other_offloaders refused_on_every_rank bad_input full_disk nothing_moved unknown_version
        threads_of_dataparallel forked_workers axolotl_plugin swift_callback recipe
        long_context checkpointing""".split(),
    ("hf", 2): """everything directory_of_a_rank resumed_both_ways not_with_replicas lora refused_on_every_rank
        bad_input full_disk parameters_before_replicas sharded""".split(),
    ("accelerate", 1): """everything saved_and_resumed raised_in_the_middle step_in_backward
        gradients_away refused_on_every_rank bad_input full_disk nothing_moved unknown_version recipe""".split(),
    ("accelerate", 2): """everything saved_and_resumed refused_on_every_rank bad_input full_disk
        parameters_before_replicas sharded own_offloading_when_sharded""".split(),
    ("lightning", 1): """everything saved_and_resumed raised_anywhere step_in_backward refused_on_every_rank
        bad_input full_disk nothing_moved unknown_version forked_workers fabric
        fabric_bad_input validated_before_and_again recipe""".split(),
    ("lightning", 2): """everything saved_and_resumed refused_on_every_rank bad_input full_disk
        parameters_before_replicas fabric fabric_bad_input sharded""".split(),
    ("trl", 1): ["trl_sft_with_lora", "trl_own_switch"],
    ("trl", 2): ["trl_sft_with_lora"],
    ("packing", 1): ["packed_lora_resumed"],
    ("combined", 1): """by_hand_with_two_optimizers goes_on_after_an_error best_at_the_end
        averaged_weights""".split(),
    ("compiled", 1): """switch_of_trainer own_backend_in_trainer dynamo_plugin_of_accelerate
        whole_module_in_lightning own_backend_in_lightning blocks_in_lightning""".split(),
    ("sentence_transformers", 1): ["cached_loss", "everything"],
    ("sentence_transformers", 2): ["everything"],
}
MODULES = {"trl": "hf", "sentence_transformers": "sentence", "packing": "combined"}  # cases in a file of another name
PACKAGES = {"hf": "transformers", "packing": "trl", "combined": "lightning", "compiled": "lightning"}


def run_job(forks: Forks, folder: Path, trainer: str, num_ranks: int) -> list[dict[str, str]]:
    """What went wrong in each case, by rank; empty texts where nothing did."""
    module = f"trainers_{MODULES.get(trainer, trainer)}"
    command = [JOBS / "trainers_worker.py", module, folder, folder / "results", *CASES[trainer, num_ranks]]
    environments = ranks(num_ranks) if num_ranks > 1 else [{}]  # a single one is started without torchrun
    done = forks.run(command, environments)
    outputs = "\n".join(f"{rank.stdout[-3000:]}\n{rank.stderr[-3000:]}" for rank in done)
    assert [rank.returncode for rank in done] == [0] * num_ranks, outputs
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in range(num_ranks)]


Results = list[dict[str, str]]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """One process imports all trainers there are."""
    there = [name for name in IMPORTED if importlib.util.find_spec(name.partition(".")[0]) is not None]
    forks = Forks(tmp_path_factory.mktemp("forks"), there, COMMON)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def results_of(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Results]:
    """Runs a job when it is asked for first. A fixture with the job as its parameter would run it for every case:
    pytest tears such a one down when the next test has another set of parameters."""
    found: dict[tuple[str, int], Results | Exception] = {}

    def results(trainer: str, num_ranks: int) -> Results:
        package = PACKAGES.get(trainer, trainer)
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make test` installs what its tests need")
        job = trainer, num_ranks
        if job not in found:
            try:
                found[job] = run_job(forks, tmp_path_factory.mktemp(f"{trainer}{num_ranks}"), *job)
            except (AssertionError, OSError) as error:
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
        if found.get(case, "").startswith("skipped: "):
            pytest.skip(found[case])
        assert found.get(case, "not reached") == "", f"rank {rank}: {found.get(case)}"
