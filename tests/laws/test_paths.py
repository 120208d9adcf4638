"""Paths and sizes as users pass them: meant from where they were passed, refused in words, with nothing changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from fault_tools import Trainer, check_equal, drain, plain_steps, policy

import ssdtrain
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy

SIZES = [f for f in ActivationPolicy.model_fields if f.endswith("_nbytes") or f == "memory_budget"]
NO_NAME = "\ud800"  # stands for no bytes


def optimizer_of() -> torch.optim.Optimizer:
    return torch.optim.AdamW(Trainer().model.parameters())


ENTRIES: dict[str, Callable[[Any], object]] = {
    "activations": ssdtrain.offload_activations,
    "parameters": lambda path: ssdtrain.offload_parameters(Trainer().model, path, blocks=["0"]),
    "optimizer": lambda path: ssdtrain.offload_optimizer(optimizer_of(), path),
}


# -- relative paths ----------------------------------------------------------------------------------------------------


def test_a_relative_directory_is_meant_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework changes the directory between steps (Hydra does): the engine was opened anew, elsewhere or not."""
    (tmp_path / "spill").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    offload = ssdtrain.offload_activations("spill", policy(), record="run.ssdtrain")
    trainer = Trainer()
    for expected in plain_steps(3):
        check_equal(trainer.step(offload, lambda: drain(offload)), expected)
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert offload.stats.kept_nbytes == 0 and not offload.stats.fallbacks, str(offload.stats)
    assert offload.stats.read_nbytes > 0
    offload.close()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["run.ssdtrain"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_relative_directories_of_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State dicts go to files made later, in the same directory."""
    (tmp_path / "spill").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = Trainer()
    values = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    ssdtrain.offload_parameters(trainer.model, Path("spill"), {"min_nbytes": 0}, ["0", "2"])
    optimizer = ssdtrain.offload_optimizer(torch.optim.AdamW(trainer.model.parameters()), "spill", {"min_nbytes": 0})
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer.forward().backward()
    assert all(torch.equal(value, values[name]) for name, value in trainer.model.state_dict().items())
    optimizer.step()
    assert optimizer.state_dict()["state"]
    optimizer.close()  # type: ignore[attr-defined]
    ssdtrain.parameter_offload(trainer.model).close()


def test_links_and_dots_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`link/..` is the parent of what the link leads to: no path arithmetic of ours."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path)
    offload = ssdtrain.offload_activations("link/..", policy())
    with offload:
        (directory,) = [file.directory for file in inside.drive(offload).files]  # type: ignore[union-attr]
        assert Path(directory).is_absolute() and os.path.samefile(directory, tmp_path / "far")
    offload.close()


# -- paths that are none -----------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, type[Exception], str]] = [
    (b"/tmp", TypeError, "Expected .* as text, got bytes b'/tmp': pass os.fsdecode"),
    ([b"/tmp"], TypeError, "as text, got bytes"),
    ("/tmp/\ud800", ValueError, "Expected a directory whose name the system can have, got .*ud800.*os.fsdecode"),
    (["/tmp/\ud800"], ValueError, "whose name the system can have"),
    ("/tmp\0x", ValueError, "null characters"),
    ("", ValueError, "Expected a directory, got ''"),
    (3, TypeError, "Expected a directory or several, got int"),
    ([3], TypeError, "Expected a directory, got int"),
    (float("nan"), TypeError, "got nan"),
    ([], ValueError, "Expected one directory or several, got none"),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("path, kind, words", REFUSED, ids=[repr(path)[:20] for path, *_ in REFUSED])
def test_what_is_no_path_is_refused_in_words(entry: str, path: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ENTRIES[entry](path)


@pytest.mark.parametrize("path", [b"run", f"run{NO_NAME}", "", 3, "a\0b"])
def test_the_path_of_a_record_too(tmp_path: Path, path: object) -> None:
    with pytest.raises((TypeError, ValueError), match="Expected a file for the record"):
        ssdtrain.offload_activations(tmp_path, record=path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [b"/tmp/model", f"/tmp/{NO_NAME}", "", 3, "/tmp/a\0b"], ids=range(5))
def test_the_paths_of_checkpoints_too(path: Any) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises((TypeError, ValueError), match="Expected a safetensors file"):
        ssdtrain.save_safetensors(model, path)
    with pytest.raises((TypeError, ValueError), match="Expected a safetensors checkpoint"):
        ssdtrain.load_safetensors(model, path)


def test_a_refused_path_leaves_the_model_as_it_was() -> None:
    trainer = Trainer()
    for entry in (
        lambda: ssdtrain.offload_parameters(trainer.model, "/tmp/\ud800"),
        lambda: ssdtrain.offload_parameters(trainer.model, b"/tmp"),  # type: ignore[arg-type]
    ):
        with pytest.raises((TypeError, ValueError)):
            entry()
    check_equal(trainer.step(), plain_steps(1)[0])


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_commands_end_with_one_line(command: str) -> None:
    option = ["--directory"] if command == "demo" else []
    arguments: list[Any] = [sys.executable, "-m", "ssdtrain", command, *option, b"/tmp/none/\xff"]
    result = subprocess.run(arguments, capture_output=True)
    assert result.returncode == 2 and result.stdout == b""
    assert re.fullmatch(
        rf"ssdtrain {command}: .*Expected a directory, got one that does not exist.*udcff'\n", result.stderr.decode()
    )


# -- sizes -------------------------------------------------------------------------------------------------------------


BEYOND = ["9" * 400, "9" * 5000 + "GiB", "8EiB", 10**30, 10**5000, -(10**400), 1e300, float("inf"), str(1 << 63)]


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("size", BEYOND, ids=range(len(BEYOND)))
def test_sizes_beyond_any_drive_are_refused_in_words(field: str, size: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a size (below 8EiB|such as)") as caught:
        ActivationPolicy(**{field: size})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("policy", [ParameterPolicy, OptimizerPolicy])
def test_of_every_policy(policy: type[ParameterPolicy | OptimizerPolicy]) -> None:
    for size in (10**30, "9" * 400, b"16MiB"):
        with pytest.raises(ValueError, match="Expected a size"):
            policy.of({"staging_nbytes": size})


def test_sizes_are_exact() -> None:
    """Not through a float, which has 53 bits."""
    assert ActivationPolicy(prefetch_nbytes=str((1 << 63) - 1)).prefetch_nbytes == (1 << 63) - 1  # type: ignore[arg-type]
    assert ActivationPolicy(prefetch_nbytes="9007199254740993 B").prefetch_nbytes == 9007199254740993  # type: ignore[arg-type]
    assert ActivationPolicy(prefetch_nbytes="0000000000000000000000065536").prefetch_nbytes == 65536  # type: ignore[arg-type]
    assert ActivationPolicy(prefetch_nbytes=f"100000.{'9' * 400}").prefetch_nbytes == 100000  # type: ignore[arg-type]


TIMES = [10**30, 10**400, "9" * 400, float("inf"), float("nan"), 1e300, 0, -1]


@pytest.mark.parametrize("seconds", TIMES, ids=range(len(TIMES)))
def test_times_that_no_clock_has(seconds: Any) -> None:
    with pytest.raises(ValueError, match="io_timeout_seconds"):
        ActivationPolicy(io_timeout_seconds=seconds)


@pytest.mark.parametrize("engine", ["auto", "io_uring", "threads", "python"])
def test_more_staging_than_there_is_memory_is_refused_in_words(tmp_path: Path, engine: str) -> None:
    for size in (1 << 45, (1 << 63) - 1):
        with pytest.raises((OSError, RuntimeError, MemoryError), match=r"staging|memory"):
            ssdtrain.offload_activations(tmp_path, {"staging_nbytes": size, "engine": engine})
