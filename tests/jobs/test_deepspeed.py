"""DeepSpeed, the real one, on the CPU with gloo: results equal to the bit, bytes on disk, errors on every rank.

The cases run in few child processes, one or two ranks each, because DeepSpeed keeps much per process; here are the
facts they come back with. See `deepspeed_cases.py` and `deepspeed_life.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doses import dose
from folders import JOBS, ROOT
from forks import Forks, ranks

from ssdtrain.api.section import Section
from ssdtrain.integrations import TESTED_VERSIONS, check_version
from ssdtrain.launch import parse

KIB = 1024
NUM_STEPS = dose(3, 5)
PLACES = {"local_rank": 3, "rank": 11}

Facts = dict[str, dict[str, Any]]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (make test installs it)"
)


def needs(*packages: str) -> pytest.MarkDecorator:
    """For what users install beside DeepSpeed; too large to be installed for these tests alone."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs pip install {' '.join(packages)}")


# -- children ----------------------------------------------------------------------------------------------------------


# A core is shared by several ranks, hence one thread each.
OURS = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{JOBS}",
    "NUM_STEPS": str(NUM_STEPS),
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """One process imports DeepSpeed."""
    forks = Forks(tmp_path_factory.mktemp("forks"), ["deepspeed"], OURS)
    yield forks
    forks.close()


def run(forks: Forks, command: list[str | Path], num_ranks: int = 1) -> list[str]:
    """Runs a command on every rank; what each printed. When one fails or hangs, all are ended and the test fails."""
    done = forks.run(command, ranks(num_ranks), ROOT)
    texts = [f"{rank.stdout[-3000:]}\n{rank.stderr[-3000:]}" for rank in done]
    assert [rank.returncode for rank in done] == [0] * num_ranks, "\n".join(texts)
    return [rank.stdout for rank in done]


def run_alone(command: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process that has imported nothing."""
    environment = os.environ | OURS | ranks(1)[0]
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, text=True, capture_output=True, timeout=600
    )


def run_cases(forks: Forks, folder: Path, num_ranks: int, names: list[str]) -> list[Facts]:
    """What the cases came to, by rank."""
    results = folder / "results"
    run(forks, [JOBS / "deepspeed_worker.py", folder, results, *names], num_ranks)
    return [json.loads(Path(f"{results}.{rank}").read_text()) for rank in range(num_ranks)]


# -- results -----------------------------------------------------------------------------------------------------------

TRAINING = """zero0 zero1 zero2 zero3 bf16_zero0 bf16_zero1 bf16_zero2 bf16_zero3 autocast_zero2 autocast_zero3
fp16_zero0 fp16_zero2 fp16_zero3 optimizer_on_cpu parameters_on_cpu""".split()
RECOMPUTING = "recompute recompute_not_reentrant recompute_not_reentrant_zero1".split()
LIFE = """loss_is_covered interrupted weights_stay ways_in log_and_detach dropped saved_and_resumed errors
shared_drive parameters_stay_theirs""".split()
TRAINING_TWO = "zero0 zero1 zero2 zero3 bf16_zero3 fp16_zero2 parameters_on_cpu".split()
RECOMPUTING_TWO = "recompute recompute_not_reentrant frozen_and_unseen".split()
CHECKPOINTING_TWO = """checkpointing checkpointing_partitioned checkpointing_on_cpu
checkpointing_not_reentrant""".split()
LIFE_TWO = "weights_stay gathered_memory_is_freed errors one_directory_per_rank saved_and_resumed".split()
PIPELINE_TWO = "pipeline pipeline_recompute".split()  # last: it changes DeepSpeed's groups for the whole process


@pytest.fixture(scope="module")
def one_rank(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return run_cases(forks, tmp_path_factory.mktemp("one"), 1, TRAINING + RECOMPUTING + LIFE)[0]


@pytest.fixture(scope="module")
def two_ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    names = TRAINING_TWO + RECOMPUTING_TWO + LIFE_TWO + CHECKPOINTING_TWO + PIPELINE_TWO
    return run_cases(forks, tmp_path_factory.mktemp("two"), 2, names)


def check_equal(facts: dict[str, Any], *, is_offloaded: bool = True) -> None:
    assert facts["losses"] and facts["finite"] and facts["grads"] and facts["parameters"], facts
    check_clean(facts, is_offloaded=is_offloaded)


def check_clean(facts: dict[str, Any], *, is_offloaded: bool = True) -> None:
    """Bytes were on disk; nothing is left, nothing was given up. Where nothing can leave, that is said."""
    assert not is_offloaded or (facts["written"] > 0 and facts["read"] > 0 and facts["disk"] > 0), facts
    assert facts["live"] == 0 and facts["files"] == 0, facts
    assert [
        text for text in facts["fallbacks"] if is_offloaded or not text.startswith("nothing was offloaded")
    ] == [], facts


def check_lower(facts: dict[str, Any], *, num_forwards: int = 1) -> None:
    """The peak of saved bytes: what is in memory is on its way (staging, prefetch), asked for, or too small to go.

    Those two budgets, per forward the two records of 256 KiB that are worked with, and a rest of small tensors.
    """
    bound = 256 * KIB + 256 * KIB + num_forwards * 2 * 256 * KIB + 128 * KIB
    assert facts["peak"] <= bound, facts
    assert facts["peak"] < 0.6 * facts["kept_peak"], facts
    assert facts["disk"] > 0.7 * facts["kept_peak"], facts


@needs_deepspeed
@pytest.mark.parametrize("name", TRAINING)
def test_training_on_one_rank(one_rank: Facts, name: str) -> None:
    check_equal(one_rank[name])
    check_lower(one_rank[name])
    assert one_rank[name]["weights"] > 0


@needs_deepspeed
@pytest.mark.parametrize("name", TRAINING_TWO)
def test_training_on_two_ranks(two_ranks: list[Facts], name: str) -> None:
    for facts in two_ranks:
        check_equal(facts[name])
        check_lower(facts[name])


@needs_deepspeed
@pytest.mark.parametrize("name", RECOMPUTING)
def test_recomputation(one_rank: Facts, name: str) -> None:
    """Little is saved, and what there is leaves."""
    check_equal(one_rank[name])


@needs_deepspeed
@pytest.mark.parametrize("name", RECOMPUTING_TWO)
def test_parameters_are_gathered_for_backward(two_ranks: list[Facts], name: str) -> None:
    """ZeRO-3 gathers in backward, for what is recomputed, and, late, for what its hooks did not see."""
    for facts in two_ranks:
        check_equal(facts[name])


@needs_deepspeed
@pytest.mark.parametrize("name", CHECKPOINTING_TWO)
def test_deepspeed_checkpointing(two_ranks: list[Facts], name: str) -> None:
    """Activations split over the ranks, and on the CPU; what is not checkpointed is offloaded."""
    for facts in two_ranks:
        check_equal(facts[name])


@needs_deepspeed
@pytest.mark.parametrize("name", PIPELINE_TWO)
def test_pipeline(two_ranks: list[Facts], name: str) -> None:
    """Two stages, four micro-batches, so that several forwards wait for their backwards.

    With everything recomputed only the loss saves something, on the last stage.
    """
    for facts in two_ranks:
        check_equal(facts[name], is_offloaded=name == "pipeline" or facts is two_ranks[-1])
        if name == "pipeline":
            check_lower(facts[name], num_forwards=2)


def _async_io() -> Path | None:
    """DeepSpeed's asynchronous I/O, if somebody has compiled it (minutes, and it needs libaio)."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    return next((path for path in root.rglob("async_io.so") if not (path.parent / "lock").exists()), None)


@needs_deepspeed
@pytest.mark.skipif(_async_io() is None, reason="needs DeepSpeed's async_io compiled: `ds_report` and libaio-dev")
def test_optimizer_on_nvme(forks: Forks, tmp_path: Path) -> None:
    """ZeRO-Infinity on the same drive: both have bytes there, and the shared drive is noted."""
    facts = run_cases(forks, tmp_path, 1, ["optimizer_on_nvme"])[0]["optimizer_on_nvme"]
    assert facts["losses"] and facts["grads"] and facts["parameters"], facts
    assert facts["written"] > 0 and facts["theirs"] > 0
    assert len(facts["fallbacks"]) == 1 and "share its bandwidth" in facts["fallbacks"][0]


# -- life --------------------------------------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.parametrize("name", ["loss_is_covered", "dropped", "errors"])
def test_life(one_rank: Facts, name: str) -> None:
    check_clean(one_rank[name])


@needs_deepspeed
def test_interruptions_are_harmless(one_rank: Facts) -> None:
    facts = one_rank["interrupted"]
    assert facts["losses"] and facts["parameters"], facts
    check_clean(facts)


@needs_deepspeed
def test_weights_are_never_offloaded(one_rank: Facts, two_ranks: list[Facts]) -> None:
    for facts in (one_rank, *two_ranks):
        assert facts["weights_stay"]["offloaded"] == {"0": 0, "1": 0, "2": 0, "3": 0}


@needs_deepspeed
def test_gathered_parameters_are_freed_as_without_us(two_ranks: list[Facts]) -> None:
    """Fails when a saved parameter is kept as an alias, which holds the buffer it was gathered in."""
    for facts in two_ranks:
        plain, ours = facts["gathered_memory_is_freed"]["plain"], facts["gathered_memory_is_freed"]["ours"]
        assert plain == ours
        assert plain[0] > 4 and plain[1] == 0


@needs_deepspeed
def test_parameters_and_optimizer_stay_deepspeeds(one_rank: Facts) -> None:
    parameters, optimizer = one_rank["parameters_stay_theirs"]["refusals"]
    assert "under DeepSpeed ZeRO-3: use its own offload_param" in parameters, parameters
    assert "DeepSpeed and Megatron offload their own" in optimizer, optimizer
    assert one_rank["parameters_stay_theirs"]["left"] == []


@needs_deepspeed
def test_ways_in(one_rank: Facts) -> None:
    facts = one_rank["ways_in"]
    assert len(facts["offloaded"]) == 5 and all(facts["offloaded"])
    assert facts["without"] == [] and facts["ignored"] == [] and facts["disabled"] == ["ssdtrain"]


@needs_deepspeed
def test_log_line(one_rank: Facts) -> None:
    """Eight micro-batches are four steps, of which every second one is logged."""
    lines = one_rank["log_and_detach"]["lines"]
    assert len(lines) == 2 and "step=2, in 2 steps" in lines[0] and "step=4, in 2 steps" in lines[1]
    assert "offloaded" in lines[0] and "stalled" in lines[0]
    check_clean(one_rank["log_and_detach"])


@needs_deepspeed
def test_saved_and_resumed(one_rank: Facts, two_ranks: list[Facts]) -> None:
    for facts in (one_rank, *two_ranks):
        assert facts["saved_and_resumed"] == {"equal": [True, True, True], "inside": []}


@needs_deepspeed
def test_no_rank_is_left_waiting(two_ranks: list[Facts]) -> None:
    """The case raises on both ranks, each time its own or the other's error, and then trains."""
    for facts in two_ranks:
        check_clean(facts["errors"])


@needs_deepspeed
def test_one_directory_per_rank(two_ranks: list[Facts]) -> None:
    for facts in two_ranks:
        assert facts["one_directory_per_rank"]["used"] == [facts["one_directory_per_rank"]["own"]]


@needs_deepspeed
def test_shared_drive_is_noted(one_rank: Facts) -> None:
    (note,) = one_rank["shared_drive"]["notes"]
    assert "ZeRO-Infinity's nvme_path" in note and "share its bandwidth" in note


# -- other trainers ----------------------------------------------------------------------------------------------------


@needs_deepspeed
@needs("transformers", "accelerate")
def test_transformers_trainer(forks: Forks, tmp_path: Path) -> None:
    run(forks, [JOBS / "deepspeed_trainers.py", "transformers", tmp_path])
    facts = json.loads((tmp_path / "results").read_text())
    assert facts["losses"] and facts["parameters"] and facts["offloaded"] > 0, facts


@needs_deepspeed
@needs("lightning")
def test_lightning(forks: Forks, tmp_path: Path) -> None:
    run(forks, [JOBS / "deepspeed_trainers.py", "lightning", tmp_path])
    facts = json.loads((tmp_path / "results").read_text())
    assert facts["losses"] and facts["parameters"] and facts["offloaded"] > 0, facts


# -- launch, versions, absence -----------------------------------------------------------------------------------------

SCRIPT = """
import sys
import deepspeed
print("arguments", sys.argv[1:], __name__)
print("wrapped", deepspeed.initialize.__module__)
"""


@needs_deepspeed
def test_launch_runs_scripts_and_modules(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    for target in (["--local_rank=0", "train.py"], ["-m", "train"]):
        done = run_alone(["-m", "ssdtrain.launch", *target, "--lr", "1"], tmp_path)
        assert done.returncode == 0, done.stderr
        output = done.stdout
        assert "wrapped ssdtrain.integrations.deepspeed" in output
        assert f"arguments {['--local_rank=0'] * (target[0] != '-m') + ['--lr', '1']} __main__" in output


@pytest.mark.parametrize("arguments", [[], ["--lr", "1"], ["-m"], ["--local_rank=0"]])
def test_launch_without_a_script(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="Expected a script to run"):
        parse(arguments)


def test_other_versions_warn() -> None:
    check_version("deepspeed", TESTED_VERSIONS["deepspeed"][0])
    with pytest.warns(RuntimeWarning, match=r"deepspeed==0\.19\.8"):
        check_version("deepspeed", "0.1.2")


def test_absence_is_an_import_error_with_the_command() -> None:
    code = "import sys; sys.modules['deepspeed'] = None; import ssdtrain.integrations.deepspeed"
    done = run_alone(["-c", code])
    assert done.returncode == 1
    assert "ImportError: Expected deepspeed" in done.stderr and "pip install" in done.stderr


# -- the section -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, text",
    [
        ("/mnt/nvme", "a mapping"),
        (
            {"activation": {}},
            "activations, parameters, optimizer; got 'activation'. Did you mean 'activations'?",
        ),
        ({"activations": "/mnt/nvme"}, "'activations' to be true, false or a mapping"),
        ({"activations": {"directry": "/a"}}, "'activations.directry'. Did you mean 'directory'?"),
        ({"activations": {}}, "to have a 'directory'"),
        ({"enabled": True}, "to have a 'directory'"),
        ({"enabled": "yes", "activations": {"directory": "/a"}}, "'enabled' to be true or false"),
        ({"enabled": False, "activations": {"enabled": True, "directory": "/a"}}, "to agree"),
        ({"activations": {"directory": 7}}, "a path or a list of paths"),
        ({"activations": {"directory": []}}, "a path or a list of paths"),
        ({"activations": {"directory": "/nvme{rnk}"}}, "Expected {local_rank} or {rank} in a directory, got {rnk}"),
        ({"activations": {"directory": "/a", "mode": "some"}}, "mode"),
        ({"activations": {"directory": "/a", "disk_nbytes": "64KiB"}}, "disk_nbytes"),
    ],
)
def test_sections_that_are_refused(section: object, text: str) -> None:
    with pytest.raises(ValueError, match="In the section 'ssdtrain'") as caught:
        Section.of(section, PLACES)
    assert text in str(caught.value)


@needs_deepspeed
def test_only_activations_in_its_section() -> None:
    from ssdtrain.integrations.deepspeed import section

    for feature in ("parameters", "optimizer"):
        with pytest.raises(ValueError, match="expected 'activations' alone under DeepSpeed"):
            section.check_features(Section.of({"directory": "/a", feature: True}, PLACES))


def test_sections_that_are_taken() -> None:
    taken = Section.of({"activations": {"directory": "/nvme{local_rank}/{rank}", "min_nbytes": "2MiB"}}, PLACES)
    assert taken.directories == ("/nvme3/11",) and taken.policy.min_nbytes == 2 << 20 and taken.policy.enabled
    several = Section.of({"enabled": True, "activations": {"directory": ["/a", "/b"], "mode": "auto"}}, PLACES)
    assert several.directories == ("/a", "/b")
    for off in (
        {"enabled": False},
        {"activations": {"enabled": False}},
        {"enabled": False, "activations": {"mode": "all"}},
    ):
        assert Section.of(off, PLACES).directories == () and not Section.of(off, PLACES).policy.enabled


# -- recipe and benchmark ----------------------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.parametrize("name", ["ds_zero2.json", "ds_zero3_offload.json"])
def test_recipe(forks: Forks, tmp_path: Path, name: str) -> None:
    """Out of the box on two processes; the losses are those without offloading."""
    recipe = ROOT / "recipes" / "deepspeed"
    size = "--layers 2 --width 64 --sequence 64 --steps 3 --min-nbytes 16KiB --mode all".split()
    command = [recipe / "train_gpt.py", "--config", recipe / name, "--dir", tmp_path, *size]
    with_us = run(forks, command, 2)
    without = run(forks, [*command, "--no-offload"], 2) if name == "ds_zero2.json" else None
    steps = [line.split("|")[1] for line in with_us[0].splitlines() if line.startswith("step ")]
    assert len(steps) == 3 and "0 B of 0 records" not in with_us[0]
    assert "records offloaded" in with_us[0] and list(tmp_path.iterdir()) == []
    if without is not None:
        assert steps == [line.split("|")[1] for line in without[0].splitlines() if line.startswith("step ")]


@needs_deepspeed
def test_benchmark(forks: Forks, tmp_path: Path) -> None:
    """It measures, and something is offloaded."""
    size = "--layers 1 --width 64 --sequence 64 --rounds 2 --min-nbytes 16KiB --mode all".split()
    (output,) = run(forks, [ROOT / "recipes" / "benchmarks" / "deepspeed_overhead.py", tmp_path, *size])
    result = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
    assert result["ratio"] > 0 and result["offloaded_nbytes"] > 0 and list(tmp_path.iterdir()) == []
