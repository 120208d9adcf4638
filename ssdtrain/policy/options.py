"""The fields of policies with the types that users may give, for type checkers."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from ssdtrain.policy.sizes import Size


class ActivationOptions(TypedDict, total=False):
    """Fields of an `ActivationPolicy`, as they may be given."""

    enabled: bool
    min_nbytes: Size
    mode: Literal["auto", "all"]
    only: Literal["marked", "checkpoint_inputs"] | None
    keep_last: int
    staging_nbytes: Size
    prefetch_nbytes: Size
    disk_nbytes: Size | None
    memory_budget: Size | None
    decline_below_nbytes: Size | None
    trim_memory: Literal["auto", "always", "never"]
    recompute: Literal["never", "auto", "all"]
    drive_writes_per_day: float | None
    endurance_tbw: float | None
    drive_life_years: float
    host_nbytes: Size | None
    engine: Literal["auto", "io_uring", "threads", "python", "kvikio"]
    io_timeout_seconds: float
    record: str | None
    record_nbytes: Size
    log_every: int
    checksum: bool


class StateOptions(TypedDict, total=False):
    """Fields that policies of parameters and of optimizer state share, as they may be given."""

    enabled: bool
    min_nbytes: Size
    staging_nbytes: Size
    disk_nbytes: Size | None
    host_nbytes: Size | None
    engine: Literal["auto", "io_uring", "threads", "python", "kvikio"]
    io_timeout_seconds: float
    checksum: bool


class ParameterOptions(StateOptions, total=False):
    """Fields of a `ParameterPolicy`, as they may be given."""

    prefetch_nbytes: Size


class OptimizerOptions(StateOptions, total=False):
    """Fields of an `OptimizerPolicy`, as they may be given."""

    chunk_nbytes: Size
    step_in_backward: bool | Literal["together"]
    offload_gradients: bool
    update_on: Literal["device", "cpu"]
    master_weights: bool
    delayed_update: bool
