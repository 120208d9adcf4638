"""A path is bytes: one that is no UTF-8 works wherever a path is taken, and what is said of it can be shown."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from engine_tools import KINDS, Io, random_bytes
from fault_tools import Trainer, check_equal, drain, plain_steps, policy
from run_tools import recorded_run
from state_tools import check_same_state

import ssdtrain
from ssdtrain.io.files.directories import check_directories
from ssdtrain.report.data import describe
from ssdtrain.run_log import read_run

NAME = os.fsdecode(b"dr\xefve:2 \xff\xfe")  # and what is between several, where there are several
SHOWN = r"dr\udcefve:2 \udcff\udcfe"
MODES = {"cpp": "auto", "python": "python"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / NAME
    made.mkdir()
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(NAME)]
    return made


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_engines_open_files_there(folder: Path, kind: str) -> None:
    io = Io(kind, folder)
    written = io.write(random_bytes(200_000), b"x")
    assert written.write.wait() and written.write.error is None
    io.check(written)
    assert [file.directory for file in io.files] == [str(folder)]
    io.close()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_it(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Io(kind, tmp_path / NAME)
    assert caught.value.filename == str(tmp_path / NAME)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_file_is_named(folder: Path, kind: str) -> None:
    io = Io(kind, folder)
    io.close()
    with pytest.raises(RuntimeError, match="got a closed one in") as caught:
        io.files[0].grow(1 << 20)
    assert str(folder) in str(caught.value)


# -- every way in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", MODES.values(), ids=MODES)
@pytest.mark.parametrize("several", [False, True])
def test_activations(folder: Path, tmp_path: Path, engine: str, several: bool) -> None:
    """Entered in every step: the second one finds the files that were kept."""
    directories = [folder, tmp_path] if several else folder
    offload = ssdtrain.offload_activations(directories, policy(engine))
    trainer = Trainer()
    for expected in plain_steps(3):
        check_equal(trainer.step(offload, lambda: drain(offload)), expected)
    stats = offload.stats
    assert stats.read_nbytes > 0 and stats.kept_nbytes == 0, str(stats)
    offload.close()
    assert not os.listdir(folder)


@pytest.mark.parametrize("engine", MODES.values(), ids=MODES)
def test_parameters_and_optimizer(folder: Path, engine: str) -> None:
    plain, trainer = Trainer(), Trainer()
    plain_adam = torch.optim.AdamW(plain.model.parameters())
    chosen: Any = {"min_nbytes": 0, "engine": engine}
    ssdtrain.offload_parameters(trainer.model, folder, chosen, ["0", "2"])
    adam = ssdtrain.offload_optimizer(torch.optim.AdamW(trainer.model.parameters()), folder, chosen)
    for _ in range(2):
        for own, optimizer in ((plain, plain_adam), (trainer, adam)):
            own.forward().backward()
            optimizer.step()
            optimizer.zero_grad()
    check_same_state(adam.state_dict(), plain_adam.state_dict())
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    adam.close()  # type: ignore[attr-defined]
    ssdtrain.parameter_offload(trainer.model).close()


def test_a_file_of_weights(folder: Path) -> None:
    model, other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    ssdtrain.save_safetensors(model, folder / NAME)
    ssdtrain.load_safetensors(other, folder / NAME)
    assert torch.equal(model.weight, other.weight)


def test_a_configuration(folder: Path) -> None:
    (folder / "section.json").write_text(json.dumps({"directory": str(folder), "activations": True}))
    section = ssdtrain.Section.load(folder / "section.json")
    assert list(section.directories) == [str(folder)]
    assert ssdtrain.Section.from_environment({"SSDTRAIN_DIR": str(folder)}) is not None


def test_placeholders_are_filled_in_there(folder: Path) -> None:
    (folder / "0").mkdir()
    offload = ssdtrain.offload_activations(folder / "{rank}", policy())
    with offload:
        (file,) = {file.directory for file in inside.drive(offload).files}
        assert file == str(folder / "0")
    offload.close()


def test_bytes_that_no_path_has_are_still_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a directory whose name the system can have, got .*ud800"):
        ssdtrain.offload_activations("/tmp/\ud800")


# -- what is said of it ------------------------------------------------------------------------------------------------


def test_a_record_there_is_read_back(folder: Path) -> None:
    """What is written has characters that every program can read."""
    path, stats = recorded_run(folder, 3, mode="all", staging_nbytes="64KiB")  # which has to be written to have room
    run = read_run(path)
    (directory,) = run.environment["directories"]
    assert Path(directory["path"]).name == SHOWN
    assert run.policy["record"].endswith(rf"{SHOWN}/run.ssdtrain")
    json.dumps(describe(run), ensure_ascii=False).encode()
    assert stats.written_nbytes > 0


def test_remarks_can_be_printed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A remark names the directory, and a stream with strict errors can take it."""
    offload = ssdtrain.offload_activations(folder, policy())
    with caplog.at_level(logging.WARNING, "ssdtrain"):
        inside.source(offload).note_fallback(f"{folder}: a remark")
    text = f"{offload.stats}{offload.stats!r}{caplog.text}"
    text.encode()
    assert SHOWN in text
    offload.close()


def test_what_is_unwise_about_it(folder: Path) -> None:
    assert check_directories([str(folder)]) == []


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]], ids=" ".join)
def test_doctor(folder: Path, arguments: list[str]) -> None:
    output = _command(*arguments, folder)
    assert "not exist" not in output and "drive" in output


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_bench(folder: Path, arguments: list[str]) -> None:
    sizes = ["--size", "8MiB", "--total", "8MiB", "--seconds", "0.1"]
    output = _command("bench", *arguments, *sizes, folder)
    if arguments:
        assert json.loads(output)["directory"] == str(folder)
    else:
        assert os.fsencode(folder).decode(errors="backslashreplace") in output or SHOWN in output


def test_report(folder: Path) -> None:
    path, _ = recorded_run(folder, 3)
    output = _command("report", path, "-o", folder / "page.html", "--trace", folder / "trace.json")
    assert "wrote" in output
    assert SHOWN in (folder / "page.html").read_text(encoding="utf-8")
    json.loads((folder / "trace.json").read_text(encoding="utf-8"))


def _command(*arguments: object) -> str:
    """What a command prints to a stream that takes UTF-8 only."""
    command = [sys.executable, "-m", "ssdtrain", *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.decode()
