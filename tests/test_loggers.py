"""Scalars in the files of the real packages, read back by them; those that are not installed are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_tools import POLICY, network, train

import ssdtrain
from ssdtrain.loggers import MlflowScalars, TensorBoardScalars, WandbScalars, scalars


def trained(tmp_path: Path, *callbacks: Any) -> ssdtrain.Stats:
    """The statistics after five steps, of which every callback heard."""
    folder = tmp_path / "spill"
    folder.mkdir()
    offload = ssdtrain.offload_activations(folder, POLICY)
    for callback in callbacks:
        offload.on_step(callback)
    train(offload, network(), 5)
    offload.close()
    return offload.stats


def test_a_callback_hears_of_every_step_in_order(tmp_path: Path) -> None:
    heard: list[tuple[int, ssdtrain.Stats]] = []
    stats = trained(tmp_path, lambda number, stats: heard.append((number, stats)))
    assert [number for number, _ in heard] == [1, 2, 3, 4, 5]
    saved = [stats.num_saved for _, stats in heard]
    assert saved == sorted(saved) and saved[-1] == stats.num_saved


def test_steps_add_up_to_the_totals(tmp_path: Path) -> None:
    heard: list[ssdtrain.Stats] = []
    stats = trained(tmp_path, lambda number, stats: heard.append(stats))
    rows = [scalars(last, now) for last, now in zip([None, *heard], heard, strict=False)]
    assert sum(row["ssdtrain/offloaded_nbytes"] for row in rows) == stats.offloaded_nbytes > 0
    assert rows[-1]["ssdtrain/peak_saved_nbytes"] == stats.peak_saved_nbytes


def test_a_callback_that_raises_does_not_disturb_training(tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(number: int, stats: ssdtrain.Stats) -> None:
        calls.append(number)
        raise ConnectionError("no server")

    stats = trained(tmp_path, broken)
    assert calls == [1]
    assert sum("ConnectionError" in text and "no server" in text for text in stats.fallbacks) == 1


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "logs"))
    stats = trained(tmp_path, TensorBoardScalars(writer))
    writer.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    found = events.Scalars("ssdtrain/offloaded_nbytes")
    assert [event.step for event in found] == [1, 2, 3, 4, 5]
    assert sum(event.value for event in found) == pytest.approx(stats.offloaded_nbytes)


@pytest.mark.needs_package("wandb")
def test_wandb_offline(tmp_path: Path) -> None:
    import wandb

    run = wandb.init(mode="offline", dir=str(tmp_path), project="test", settings=wandb.Settings(silent=True))
    stats = trained(tmp_path, WandbScalars(run))
    summary = dict(run.summary)
    run.finish()
    assert summary["ssdtrain/step"] == 5
    assert summary["ssdtrain/peak_saved_nbytes"] == stats.peak_saved_nbytes
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.needs_package("mlflow")
def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a data base would take packages of its own
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as active:
        stats = trained(tmp_path, MlflowScalars(mlflow, active.info.run_id))
    history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "ssdtrain/offloaded_nbytes")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5]
    assert sum(metric.value for metric in history) == stats.offloaded_nbytes
