"""Megatron: the real megatron-core on one and two ranks (gloo, on the CPU), without and with ssdtrain.

`megatron_worker.py` is one rank; two runs of it play all cases. What they saw is looked at here, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doses import dose
from folders import HELPERS, JOBS, RECIPES, ROOT
from forks import Forks, ranks

from ssdtrain.integrations import megatron
from ssdtrain.integrations.arguments import asked_for
from ssdtrain.io.files.paths import fill_in
from ssdtrain.policy import ActivationPolicy

NUM_STEPS = dose(3, 5)

ALONE = "plain ddp distributed-optimizer bf16 dropout full-recompute selective-recompute experts megatron-lm".split()
PAIR = (
    "tensor sequence sequence-selective distributed-checkpoints pipeline pipeline-megatron-lm pipeline-keeps-outputs"
    " pipeline-full-recompute interleaved context data data-distributed-optimizer experts-parallel"
).split()
CHECKS_ALONE = ["emptied", "alone", "bridge", "bridge-raises"]
CHECKS_PAIR = "missing-directory missing-directory-in-pipeline conflicts schedules".split()
CASES = [(name, rank) for names, ranks in ((ALONE, [0]), (PAIR, [0, 1])) for name in names for rank in ranks]

STAGING = PREFETCH = 512 * 1024  # of the worker's policy
LARGEST = 512 * 1024  # attention probabilities: batch 2, 4 heads, 128 x 128 positions, 4 bytes
MIN_KEPT = 6 << 20  # below, what staging, prefetch and one operator need is not much less than what is kept


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """One process imports megatron-core, which takes it as long as training these models a few steps."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}", "NUM_STEPS": str(NUM_STEPS)}
    forks = Forks(tmp_path_factory.mktemp("forks"), ["megatron.core.models.gpt", "megatron.core.optimizer"], own)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def seen(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every rank of every case saw."""
    found = {}
    for world, names in ((1, ALONE + CHECKS_ALONE), (2, PAIR + CHECKS_PAIR)):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        run_ranks(forks, world, folder, names)
        for name in names:
            found[name] = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(world)]
        left = [path for path in (folder / "spill").rglob("*") if path.is_file()]
        assert left == [], "files were left behind"
    return found


def run_ranks(forks: Forks, world: int, folder: Path, names: list[str]) -> None:
    done = forks.run([JOBS / "megatron_worker.py", folder, *names], ranks(world))
    errors = [json.loads(path.read_text()).get("error", "") for path in sorted(folder.glob("*.json"))]
    texts = [rank.stderr[-2000:] for rank in done]
    codes = [rank.returncode for rank in done]
    assert codes == [0] * world and not any(errors), "\n".join([*filter(None, errors), *texts])


# -- cases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rank", CASES)
def test_equal_to_the_bit(seen: dict[str, list[dict[str, Any]]], name: str, rank: int) -> None:
    """Losses, gradients and weights of some steps, and bytes that were on the drive meanwhile."""
    result = seen[name][rank]
    assert result["is_equal"] and result["num_compared"] > 5
    assert result["num_live_records"] == 0 and result["fallbacks"] == []
    assert result["file_nbytes"] >= result["peak_disk_nbytes"] > 0
    assert result["written_nbytes"] > 0 and result["read_nbytes"] > 0


@pytest.mark.parametrize("name, rank", CASES)
def test_weights_stay(seen: dict[str, list[dict[str, Any]]], name: str, rank: int) -> None:
    """Parameters that are views of one big buffer, their views and transposes, and `main_grad` are never offloaded."""
    assert seen[name][rank]["weights_stay"]


@pytest.mark.parametrize("name, rank", CASES)
def test_peak(seen: dict[str, list[dict[str, Any]]], name: str, rank: int) -> None:
    """The peak of saved bytes falls by at least what the formula says.

    Recomputing whole layers keeps less than staging and prefetch may take: such cases have no peak to lower here.
    """
    result = seen[name][rank]
    assert ("full" in name or "checkpoints" in name) == (result["kept_nbytes"] < 2 << 20)
    if result["kept_nbytes"] < MIN_KEPT:
        return
    small = result["skipped"]["smaller than min_nbytes"]["nbytes"]
    num_forwards = (
        NUM_STEPS * (4 if "pipeline" in name or "interleaved" in name else 2) * (2 if name == "interleaved" else 1)
    )
    small_nbytes = small / num_forwards * result["num_in_flight"]
    predicted = result["kept_nbytes"] - (
        small_nbytes  # what is too small to leave, of all forward steps that wait for their backward
        + STAGING  # on its way out while the last of it is being saved, or being read ahead of need
        + PREFETCH  # read, or read and lent to backward, before it is asked for
        + 2
        * LARGEST  # what the operator in hand works with, and what the one before it saved and is not yet on its way
    )
    assert result["kept_nbytes"] - result["peak_saved_nbytes"] >= 0.9 * predicted  # more, the faster the drive


@pytest.mark.parametrize("name", ["selective-recompute", "sequence-selective"])
def test_storages_that_megatron_refills_stay(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    """A recomputed norm's output is freed after its consumer's forward: no copy of it may be under way then."""
    for result in seen[name]:
        assert (
            result["skipped"]["refilled by its owner"]["count"] == NUM_STEPS * 2 * 6 * 2
        )  # steps, micro-batches, layers, norms


def test_emptied_outputs(seen: dict[str, list[dict[str, Any]]]) -> None:
    """Outputs that the schedule empties come back from memory and from the drive; changes in place are noticed."""
    are_equal, message = seen["emptied"][0]["result"]
    assert are_equal
    assert "modified by an inplace operation" in message


def test_events_of_megatron_bridge(seen: dict[str, list[dict[str, Any]]]) -> None:
    is_equal, read_nbytes, num_refilled, conflict, refusal = seen["bridge"][0]["result"]
    assert is_equal and read_nbytes and num_refilled
    assert "Expected cpu_offloading off" in conflict and "Expected activations alone with Megatron" in refusal


def test_nothing_stays_on_when_training_under_megatron_bridge_raises(seen: dict[str, list[dict[str, Any]]]) -> None:
    """In forward the hooks are on until it raises; in backward they are off; what covers the model goes too."""
    assert seen["bridge-raises"][0]["result"] == [True, True, True, False, True, True, True, True]


# -- errors on every rank ----------------------------------------------------------------------------------------------


def messages(seen: dict[str, list[dict[str, Any]]], name: str) -> list[str]:
    """The errors of a check, which must be the same on every rank."""
    first, second = (result["result"] for result in seen[name])
    assert first == second
    return list(first)


@pytest.mark.parametrize("name", ["missing-directory", "missing-directory-in-pipeline"])
def test_missing_directory(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    for message in messages(seen, name):
        assert message.startswith("RuntimeError: Expected ssdtrain to start on every rank, got:\nrank 1: [Errno 2]")
        assert message.endswith("1'") and "rank 0" not in message


def test_a_single_rank_raises_the_error_itself(seen: dict[str, list[dict[str, Any]]]) -> None:
    first, again, conflict, conflict_again = seen["alone"][0]["result"]
    assert first == again and first.startswith("FileNotFoundError: [Errno 2] Expected a directory")
    assert conflict == conflict_again and conflict.startswith("ValueError: Expected cpu_offloading off")


def test_conflicts(seen: dict[str, list[dict[str, Any]]]) -> None:
    names = ("cpu_offloading", "fine_grained_activation_offloading", "overlap_moe_expert_parallel_comm")
    for name, message in zip(names, messages(seen, "conflicts"), strict=True):
        assert f"rank 0: Expected {name} off" in message and f"rank 1: Expected {name} off" in message


def test_schedules_that_do_not_fit(seen: dict[str, list[dict[str, Any]]]) -> None:
    none_yet, sizes, one_wrong, foreign = messages(seen, "schedules")
    assert "Expected initialize_model_parallel to have been called" in none_yet
    assert "world_size (2) is not divisible by 3" in sizes
    assert (
        "rank 1: Expected forward_backward_pipelining_without_interleaving" in one_wrong and "rank 0" not in one_wrong
    )
    assert "Expected one of megatron-core's schedules" in foreign and "got print" in foreign


# -- arguments, versions -----------------------------------------------------------------------------------------------


def parse(*options: str) -> argparse.Namespace:
    return megatron.add_arguments(argparse.ArgumentParser()).parse_args(options)


def test_every_field_of_the_policy_is_an_option() -> None:
    options = ["--ssdtrain-min-nbytes", "2MiB", "--ssdtrain-mode", "all", "--ssdtrain-checksum"]
    args = parse("--ssdtrain-dir", "/a", "/b", *options, "--ssdtrain-io-timeout-seconds", "5", "--ssdtrain-enabled")
    directories, policy = asked_for(args) or ((), None)
    assert directories == ["/a", "/b"]
    expected = {"min_nbytes": 2 << 20, "mode": "all", "checksum": True, "io_timeout_seconds": 5, "enabled": True}
    assert policy == ActivationPolicy.of(expected)
    assert {f"ssdtrain_{name}" for name in (*ActivationPolicy.model_fields, "dir")} == set(vars(args))


def test_help_says_what_the_policy_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Saved tensors smaller than this stay in memory" in text and "{auto,all}" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ssdtrain-mode", "fast"], "Input should be 'auto' or 'all', got 'fast'"),
        (["--ssdtrain-min-nbytes", "big"], "Expected a size such as"),
        (["--ssdtrain-staging-nbytes", "1"], "greater than or equal to 65536"),
        (["--ssdtrain-directory", "/x"], "unrecognized arguments"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        parse(*options)
    assert message in capsys.readouterr().err


def test_what_the_options_ask_for(tmp_path: Path) -> None:
    assert asked_for(parse()) is None
    assert asked_for(parse("--ssdtrain-dir", str(tmp_path), "--no-ssdtrain-enabled")) is None
    with pytest.raises(ValueError, match="Expected --ssdtrain-dir beside --ssdtrain-mode, got none"):
        asked_for(parse("--ssdtrain-mode", "all"))
    with pytest.raises(ValueError, match="parse them with add_arguments"):
        asked_for(argparse.Namespace())
    with pytest.raises(ValueError, match="at least min_nbytes"):
        asked_for(parse("--ssdtrain-dir", str(tmp_path), "--ssdtrain-disk-nbytes", "64KiB"))


def test_directory_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fill_in("/nvme{local_rank}/{rank}") == "/nvme1/9"
    with pytest.raises(ValueError, match=re.escape("got {host} in '/x/{host}'")):
        fill_in("/x/{host}")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="Expected LOCAL_RANK in the environment"):
        fill_in("/nvme{local_rank}")


def test_unseen_version_and_no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("megatron.core")
    other.__version__ = "9.9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", other)
    with pytest.warns(RuntimeWarning, match=r"Expected megatron-core 0\.16\.1, .* got 9\.9\.9"):
        megatron.wrap_forward_step(len, lambda: parse())
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match=r"pip install megatron-core==0\.16\.1"):
        megatron.wrap_forward_step(len, parse())
    with pytest.raises(ImportError, match=r"pip install megatron-core==0\.16\.1"):
        megatron.offload_schedule(len, "/x")


# -- recipes -----------------------------------------------------------------------------------------------------------


def run_recipe(forks: Forks, *options: str) -> list[str]:
    """Losses and statistics that the recipe prints, at toy size, on two CPU processes."""
    size = "--steps 3 --layers 2 --hidden 64 --sequence 128 --micro-batch 2".split()
    done = forks.run([RECIPES / "megatron" / "pretrain_gpt.py", *size, *options], ranks(2))
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    lines = "".join(rank.stdout for rank in done).splitlines()
    return [line.split(" | ")[1] for line in lines if line.startswith("step")] + [
        line for line in lines if line.startswith("ssdtrain:")
    ]


def test_recipe(forks: Forks, tmp_path: Path) -> None:
    """It prints the same losses with and without, and what was offloaded."""
    plain = run_recipe(forks)
    *losses, stats = run_recipe(
        forks, "--ssdtrain-dir", str(tmp_path), "--ssdtrain-mode", "all", "--ssdtrain-min-nbytes", "16KiB"
    )
    assert len(plain) == 3 and losses == plain
    assert re.match(r"ssdtrain: [\d.]+ MiB of \d+ records offloaded", stats)


def test_recipe_refuses_sizes_that_do_not_fit(forks: Forks) -> None:
    (done,) = forks.run([RECIPES / "megatron" / "pretrain_gpt.py", "--tensor", "3"])
    assert done.returncode == 2 and "tensor x pipeline = 3 divides, got 1" in done.stderr


@pytest.mark.parametrize("name", ["gpt", "bert", "t5"])
def test_launch_scripts(name: str) -> None:
    """They are valid, say what they miss, and their options exist; `echo` stands in for torchrun and the GPUs."""
    script = str(RECIPES / "megatron" / f"{name}.sh")
    subprocess.run(["bash", "-n", script], check=True)
    bare = {"PATH": os.environ["PATH"]}
    missing = subprocess.run([script], env=bare, capture_output=True, text=True)
    assert missing.returncode != 0 and "Expected MEGATRON_LM" in missing.stderr
    given = {"MEGATRON_LM": "/lm", "SPILL": "/nvme/{local_rank}", "DATA": "--data-path text", "TORCHRUN": "echo"}
    shape = {"HIDDEN": "12288", "LAYERS": "3"}
    done = subprocess.run([script, "--more"], env=bare | given | shape, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert f"/lm/pretrain_{name}.py" in words and words[-3:] == ["--data-path", "text", "--more"]
    assert (
        words[words.index("--hidden-size") + 1] == "12288" and words[words.index("--num-attention-heads") + 1] == "96"
    )
    parser = megatron.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args, others = parser.parse_known_args(words[words.index("--hidden-size") :])
    assert not [word for word in others if word.startswith("--ssdtrain")]
    assert asked_for(args) is not None and args.ssdtrain_dir == ["/nvme/{local_rank}"]


def test_running_a_script_of_a_checkout(tmp_path: Path) -> None:
    """`run.py` gives the script's `pretrain` the options and the forward step, and leaves everything else alone.

    Megatron-LM cannot be installed: a package of the same shape stands in for it.
    """
    package = tmp_path / "megatron" / "training"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import argparse\n"
        "def get_args(): return args\n"
        "def pretrain(data, model, model_type, forward_step_func, extra_args_provider=None, args_defaults={}):\n"
        "    global args\n"
        "    args = extra_args_provider(argparse.ArgumentParser()).parse_args(namespace=argparse.Namespace(rank=0))\n"
        "    print(data, model, forward_step_func.__name__, args.theirs, args.ssdtrain_mode, args_defaults)\n"
    )
    (tmp_path / "pretrain_x.py").write_text(
        "from megatron.training import get_args, pretrain\n"
        "def forward_step(data_iterator, model): ...\n"
        "def more(parser):\n"
        "    parser.add_argument('--theirs')\n"
        "    return parser\n"
        "if __name__ == '__main__':\n"
        "    pretrain('data', 'model', 1, forward_step, extra_args_provider=more, args_defaults={'a': 1})\n"
    )
    command = [sys.executable, str(RECIPES / "megatron" / "run.py"), str(tmp_path / "pretrain_x.py")]
    options = ["--theirs", "1", "--ssdtrain-dir", str(tmp_path), "--ssdtrain-mode", "all"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "data model forward_step 1 all {'a': 1}"
    no_script = subprocess.run([command[0], command[1], "/no/such.py"], capture_output=True, text=True, env=environment)
    assert no_script.returncode == 1 and "Expected a script of a Megatron-LM checkout" in no_script.stderr


def test_benchmark(forks: Forks, tmp_path: Path) -> None:
    size = "--pairs 1 --layers 2 --hidden 64 --sequence 128 --min-nbytes 16KiB --mode all".split()
    (done,) = forks.run([RECIPES / "benchmarks" / "megatron_overhead.py", tmp_path, *size], ranks(1))
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["offloaded_nbytes"] > 0 and result["overhead"] > 0 and result["machine"]["megatron-core"]
