"""Scalars of every step for TensorBoard, Weights & Biases and MLflow: one small callback each.

Knows what is worth a curve, and none of the three packages: each callback uses the object its user already has.

Example:
    >>> offload.on_step(TensorBoardScalars(SummaryWriter()))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdtrain.stats import Stats

__all__ = ["MlflowScalars", "TensorBoardScalars", "WandbScalars", "scalars"]

_TOTALS = (
    "offloaded_nbytes kept_nbytes forwarded_nbytes written_nbytes read_nbytes hosted_nbytes stall_seconds "
    "num_prefetched num_demand_reloads"
).split()
_GAUGES = (
    "peak_memory_nbytes last_memory_nbytes peak_saved_nbytes peak_device_nbytes peak_disk_nbytes peak_host_nbytes "
    "predicted_peak_nbytes measured_peak_nbytes predicted_step_seconds measured_step_seconds"
).split()


def scalars(last: Stats | None, now: Stats) -> dict[str, float]:
    """What happened since `last` under ``ssdtrain/...``: differences of totals, and the latest of the rest."""
    found = {f"ssdtrain/{name}": float(getattr(now, name) - (getattr(last, name) if last else 0)) for name in _TOTALS}
    found |= {f"ssdtrain/{name}": float(getattr(now, name)) for name in _GAUGES}
    found["ssdtrain/num_fallbacks"] = float(len(now.fallbacks))
    return found


class _Scalars:
    """Remembers the last step, so that totals become steps."""

    def __init__(self) -> None:
        self._last: Stats | None = None

    def __call__(self, step: int, stats: Stats) -> None:
        """Logs one step; for `ActivationOffload.on_step`, or by hand: ``callback(step, offload.stats)``."""
        values, self._last = scalars(self._last, stats), stats
        self._log(values, step)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        raise NotImplementedError


class TensorBoardScalars(_Scalars):
    """Logs to a `torch.utils.tensorboard.SummaryWriter`."""

    def __init__(self, writer: Any) -> None:
        """`writer` stays the user's: to flush and to close."""
        super().__init__()
        self._writer = writer

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class WandbScalars(_Scalars):
    """Logs to a run of Weights & Biases, with an axis of its own: the user's other steps may count differently."""

    def __init__(self, run: Any) -> None:
        """`run` is what ``wandb.init()`` returned."""
        super().__init__()
        self._run = run
        run.define_metric("ssdtrain/step")
        run.define_metric("ssdtrain/*", step_metric="ssdtrain/step")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "ssdtrain/step": step})


class MlflowScalars(_Scalars):
    """Logs to a run of MLflow."""

    def __init__(self, client: Any, run_id: str) -> None:
        """`client` is a module or object with ``log_metrics(metrics, step, run_id)``, such as ``mlflow`` itself."""
        super().__init__()
        self._client, self._run_id = client, run_id

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._client.log_metrics(dict(values), step=step, run_id=self._run_id)
