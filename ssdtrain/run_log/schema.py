"""What the blocks of a record may hold. A record comes from anywhere: what is read of it has the types it should have.

Numbers are finite and of a size that training can have, so that nothing that is worked out of them overflows; texts are
any text, so whoever shows them escapes them. Blocks of kinds that are not known here are left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ssdtrain.run_log.encode import MAX_RECORDS

_LEAST_SECONDS = 1e-9  # rates of less would not be finite
_MAX_WORDS = 300  # characters of a message

_Nbytes = Annotated[int, Field(ge=0, le=1 << 60)]
_Time = Annotated[int, Field(ge=-(10**15), le=10**15)]
_Sum = Annotated[int | float, Field(ge=0, le=1e20, allow_inf_nan=False)]
_Seconds = Annotated[
    float,
    Field(ge=0, le=1e10, allow_inf_nan=False),
    AfterValidator(lambda seconds: seconds if seconds >= _LEAST_SECONDS else 0.0),
]
_Clock = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
_Number = Annotated[int, Field(ge=1, le=10**12)]
_Values = Annotated[dict[str, JsonValue], AfterValidator(lambda values: _finite(values))]
_Places = Annotated[list[Literal[0, 1, 2]], Field(max_length=MAX_RECORDS)]
_Times = Annotated[list[_Time], Field(max_length=MAX_RECORDS)]
_Sizes = Annotated[list[_Nbytes], Field(max_length=MAX_RECORDS)]
_STRICT = ConfigDict(strict=True)


class Directory(TypedDict):
    """One of those that were used."""

    path: str
    nbytes: _Nbytes


class Environment(TypedDict, total=False):
    """Versions and machine."""

    began: str
    """Date and time."""
    host: str
    command: str
    """What is secret in it is left out."""
    commit: str
    """Of the directory it was started in, where that is a repository."""
    python: str
    packages: dict[str, str]
    """Versions."""
    system: str
    processor: str
    num_cpus: _Nbytes
    memory_nbytes: _Nbytes
    num_threads: _Nbytes
    """Of PyTorch."""
    accelerators: list[str]
    unix_clock_ahead_seconds: _Clock
    """To add to `began` of steps for the time of day."""
    rank: _Nbytes
    world_size: _Nbytes
    directories: list[Directory]
    """Where spill files are."""


class Head(TypedDict):
    """The first block."""

    kind: Literal["run"]
    policy: _Values
    """Fields of the `ActivationPolicy`."""
    environment: Environment
    counters: Annotated[list[str], Field(max_length=1000)]
    """Names of the totals that every step has."""


class Row(TypedDict):
    """One step, or a few."""

    kind: Literal["step"]
    step: _Number
    """The last of these steps, from 1."""
    num_steps: _Number
    """How many share this row: of long runs, older rows are merged."""
    began: _Clock
    """On the clock of the process."""
    seconds: _Seconds
    """Of all of them together."""
    worst_seconds: _Seconds
    """Of the slowest."""
    stall_seconds: _Seconds
    """Of all of them together."""
    peak_nbytes: _Nbytes
    """The highest."""
    peak_if_kept_nbytes: _Nbytes
    """Had everything stayed in memory."""
    predicted_peak_nbytes: _Sum
    """By the plan; 0 without one."""
    predicted_seconds: _Seconds
    """The same."""
    counters: Annotated[list[_Sum], Field(max_length=1000)]
    """Running totals, in the order of the first block."""


class Columns(TypedDict):
    """Of the records in a timeline."""

    nbytes: _Sizes
    """Size."""
    module: _Sizes
    """Its number in `modules`."""
    micro_batch: _Times
    """Its forward pass."""
    saved: _Times
    """Microseconds since the step began, -1 for never, as in the next two."""
    needed: _Times
    released: _Times
    where: _Places
    """Where it went: 0 nowhere, 1 host tier, 2 drive."""
    planned: _Places
    """Where the plan had it; empty without one."""


class Timeline(TypedDict):
    """One step in full."""

    kind: Literal["detail"]
    step: _Number
    why: Literal["first", "sample", "worst"]
    began: _Clock
    seconds: _Seconds
    num_omitted: _Nbytes
    is_wall_time: bool
    modules: list[str]
    records: Columns
    writes: list[Annotated[list[_Time], Field(min_length=9, max_length=9)]]
    reads: list[Annotated[list[_Time], Field(min_length=6, max_length=6)]]
    stalls: list[tuple[str, _Time, _Time, _Time]]
    other: list[tuple[_Time, _Nbytes]]


class Skipped(TypedDict):
    """What stayed for one reason."""

    count: _Sum
    nbytes: _Sum


class Stats(TypedDict, total=False):
    """What a report needs of the totals; whatever else is there stays."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]
    fallbacks: list[str]
    plan: str
    engine: str
    engine_reason: str
    stalls: dict[str, _Sum]
    skipped: dict[str, Skipped]


class State(TypedDict):
    """Totals with reasons, and sums by module."""

    kind: Literal["state"]
    step: _Nbytes
    stats: Stats
    """Fields of `Stats`, after this step."""
    modules: dict[str, Annotated[list[_Sum], Field(min_length=5, max_length=5)]]
    """Records, bytes kept, bytes to the host tier, bytes to the drive, seconds waited."""


class End(TypedDict):
    """The record was closed."""

    kind: Literal["end"]


_BLOCK: TypeAdapter[Any] = TypeAdapter(
    Annotated[Head | Row | Timeline | State | End, Field(discriminator="kind")], config=_STRICT
)


def parse(text: bytes) -> dict[str, Any] | None:
    """A block of JSON with the types that it should have; None of a kind that is not known.

    Raises:
        ValueError: it is something else; in one line.
    """
    try:
        block: dict[str, Any] = _BLOCK.validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if found["type"] == "union_tag_invalid":
            return None
        place = ".".join(map(str, found["loc"]))
        words = f"{place}: {found['msg']}" if place else found["msg"]
        raise ValueError("".join([c for c in words if c.isprintable()])[:_MAX_WORDS]) from error
    if block["kind"] == "detail":
        _check_timeline(block)
    return block


def _check_timeline(block: dict[str, Any]) -> None:
    """What types cannot say: columns of one length, and places that there are."""
    columns = block["records"]
    num = len(columns["nbytes"])
    for name, column in columns.items():
        if len(column) != num and (name != "planned" or column):
            raise ValueError(f"records.{name}: Expected {num} values, got {len(column)}")
    for name, places, least, end in (
        ("records.module", columns["module"], 0, len(block["modules"])),
        ("writes", [row[0] for row in block["writes"]], 0, num),
        ("reads", [row[0] for row in block["reads"]], 0, num),
        ("stalls", [row[1] for row in block["stalls"]], -1, num),
    ):
        if places and not least <= min(places) <= max(places) < end:
            raise ValueError(f"{name}: Expected numbers from {least} to {end - 1}, got others")
    if any(row[1] < 0 for row in (*block["writes"], *block["reads"])) or any(row[3] < 0 for row in block["stalls"]):
        raise ValueError("writes, reads, stalls: Expected sizes and times from 0 on, got less")


def _finite(values: Any) -> Any:
    """Settings as they are; infinities and the like have no place in JSON."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, float) and not abs(value) < float("inf"):
            raise ValueError(f"Expected a finite number, got {value}")
    return values
