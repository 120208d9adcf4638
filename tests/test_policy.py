"""What a user may ask for, in every way of asking, and what is said to those who ask for something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import ssdtrain
from ssdtrain import ActivationPolicy

DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "min_nbytes": 1 << 20,
    "only": None,
    "keep_last": 0,
    "mode": "auto",
    "staging_nbytes": 128 << 20,
    "prefetch_nbytes": 128 << 20,
    "disk_nbytes": None,
    "memory_budget": None,
    "decline_below_nbytes": None,
    "trim_memory": "auto",
    "recompute": "never",
    "drive_writes_per_day": None,
    "endurance_tbw": None,
    "drive_life_years": 5.0,
    "host_nbytes": None,
    "engine": "auto",
    "io_timeout_seconds": 60.0,
    "record": None,
    "record_nbytes": 16 << 20,
    "log_every": 0,
    "checksum": False,
}

ACCEPTED: list[tuple[str, Any, Any]] = [
    ("enabled", False, False),
    ("enabled", "false", False),
    ("enabled", "1", True),
    ("min_nbytes", 0, 0),
    ("min_nbytes", 4096, 4096),
    ("min_nbytes", "4096", 4096),
    ("min_nbytes", "64KiB", 64 * 1024),
    ("min_nbytes", "64 kib", 64 * 1024),
    ("min_nbytes", "64K", 64 * 1024),
    ("min_nbytes", "64kB", 64_000),
    ("min_nbytes", "1.5MiB", 3 << 19),
    ("min_nbytes", "512 B", 512),
    ("mode", "auto", "auto"),
    ("mode", "all", "all"),
    ("only", None, None),
    ("only", "marked", "marked"),
    ("keep_last", 4, 4),
    ("only", "checkpoint_inputs", "checkpoint_inputs"),
    ("staging_nbytes", 64 * 1024, 64 * 1024),
    ("staging_nbytes", "2GB", 2 * 10**9),
    ("prefetch_nbytes", 0, 0),
    ("prefetch_nbytes", "1TiB", 1 << 40),
    ("disk_nbytes", None, None),
    ("disk_nbytes", "1GiB", 1 << 30),
    ("memory_budget", "20GiB", 20 << 30),
    ("decline_below_nbytes", "20MiB", 20 << 20),
    ("trim_memory", "always", "always"),
    ("recompute", "all", "all"),
    ("drive_writes_per_day", "0.3", 0.3),
    ("endurance_tbw", 600, 600.0),
    ("drive_life_years", 3, 3.0),
    ("host_nbytes", 0, 0),
    *(("engine", engine, engine) for engine in ("auto", "io_uring", "threads", "python")),
    ("record", "run.{rank}.ssdtrain", "run.{rank}.ssdtrain"),
    ("record_nbytes", "1MiB", 1 << 20),
    ("log_every", "10", 10),
    ("io_timeout_seconds", 0.5, 0.5),
    ("io_timeout_seconds", "120", 120.0),
    ("checksum", True, True),
    ("checksum", "on", True),
]

REFUSED: list[tuple[str, Any, str]] = [
    ("enabled", "perhaps", "valid boolean"),
    ("enabled", None, "valid boolean"),
    ("min_nbytes", -1, "greater than or equal to 0"),
    ("min_nbytes", "-1", "Expected a size such as"),
    ("min_nbytes", "much", "Expected a size such as"),
    ("min_nbytes", "16 MiBs", "Expected a size such as"),
    ("min_nbytes", "", "Expected a size such as"),
    ("min_nbytes", True, "Expected a size such as"),
    ("min_nbytes", 1.5, "valid integer"),
    ("min_nbytes", None, "valid integer"),
    ("only", "some", "'marked' or 'checkpoint_inputs'"),
    ("keep_last", -1, "greater than or equal to 0"),
    ("mode", "most", "'auto' or 'all'"),
    ("mode", "ALL", "'auto' or 'all'"),
    ("staging_nbytes", 64 * 1024 - 1, "greater than or equal to 65536"),
    ("staging_nbytes", "1KiB", "greater than or equal to 65536"),
    ("prefetch_nbytes", -5, "greater than or equal to 0"),
    ("disk_nbytes", 0, "greater than or equal to 65536"),
    ("memory_budget", 0, "greater than 0"),
    ("decline_below_nbytes", -1, "greater than or equal to 0"),
    ("trim_memory", "sometimes", "'auto', 'always' or 'never'"),
    ("drive_writes_per_day", 0, "greater than 0"),
    ("recompute", "auto", "memory_budget"),
    ("endurance_tbw", "600TB", "valid number"),
    ("drive_life_years", "inf", "finite"),
    ("host_nbytes", -1, "greater than or equal to 0"),
    ("engine", "gds", "'auto', 'io_uring', 'threads', 'python' or 'kvikio'"),
    ("engine", None, "'auto', 'io_uring', 'threads', 'python' or 'kvikio'"),
    ("record", "", "at least 1 character"),
    ("record", 3, "valid string"),
    ("record_nbytes", "1KiB", "greater than or equal to 65536"),
    ("log_every", -1, "greater than or equal to 0"),
    ("io_timeout_seconds", 0, "greater than 0"),
    ("io_timeout_seconds", "soon", "valid number"),
    ("checksum", "crc", "valid boolean"),
]


def test_defaults_cover_every_field() -> None:
    assert ActivationPolicy().model_dump() == DEFAULTS
    assert {field for field, *_ in ACCEPTED} == {field for field, *_ in REFUSED} == set(DEFAULTS)


@pytest.mark.parametrize("field, value, expected", ACCEPTED)
def test_accepted(field: str, value: Any, expected: Any) -> None:
    """As a keyword, in a mapping, and in JSON."""
    assert getattr(ActivationPolicy(**{field: value}), field) == expected
    assert ActivationPolicy.of({field: value}).model_dump() == DEFAULTS | {field: expected}
    assert getattr(ActivationPolicy.model_validate_json(json.dumps({field: value})), field) == expected


@pytest.mark.parametrize("field, value, message", REFUSED)
def test_refused(field: str, value: Any, message: str) -> None:
    """With the name of the field and what would be accepted, before training starts."""
    for attempt in (
        lambda: ActivationPolicy(**{field: value}),
        lambda: ActivationPolicy.of({field: value}),
        lambda: ActivationPolicy.model_validate_json(json.dumps({field: value})),
        lambda: ssdtrain.offload_activations("missing", policy={field: value}),
    ):
        with pytest.raises(ValueError, match=field) as caught:
            attempt()
        assert message in str(caught.value)


@pytest.mark.parametrize("size, nbytes", [("2GiB", 1 << 31), ("1.5 GB", 1_500_000_000), ("3t", 3 << 40), ("7b", 7)])
def test_sizes(size: str, nbytes: int) -> None:
    assert ActivationPolicy(prefetch_nbytes=size).prefetch_nbytes == nbytes


def test_size_message_lists_examples() -> None:
    with pytest.raises(ValueError, match=r"such as 1048576, '64KiB', '16MiB' or '1.5GB', got 'big'"):
        ActivationPolicy(min_nbytes="big")


@pytest.mark.parametrize("how", ["keyword", "mapping", "json"])
def test_unknown_key(how: str) -> None:
    """A misspelt key must not be ignored: the run would go on with the default."""
    attempts = {
        "keyword": lambda: ActivationPolicy(min_bytes=1),  # type: ignore[call-arg]
        "mapping": lambda: ActivationPolicy.of({"min_bytes": 1}),
        "json": lambda: ActivationPolicy.model_validate_json('{"min_bytes": 1}'),
    }
    with pytest.raises(ValueError, match=r"got 'min_bytes'\. Did you mean 'min_nbytes'") as caught:
        attempts[how]()
    for field in DEFAULTS:
        assert field in str(caught.value)


def test_unknown_key_unlike_any() -> None:
    with pytest.raises(ValueError, match=r"Expected keys among enabled, .*; got 'zzz'") as caught:
        ActivationPolicy.of({"zzz": 1})
    assert "Did you mean" not in str(caught.value)


def test_a_cap_below_the_smallest_tensor() -> None:
    """Nothing could ever leave: a mistake in one of the two numbers."""
    with pytest.raises(ValueError, match=r"disk_nbytes of at least min_nbytes \(2097152\), got 1048576"):
        ActivationPolicy(min_nbytes="2MiB", disk_nbytes="1MiB")
    assert ActivationPolicy(min_nbytes="1MiB", disk_nbytes="1MiB").disk_nbytes == 1 << 20


def test_frozen() -> None:
    policy = ActivationPolicy()
    for field, value in DEFAULTS.items():
        with pytest.raises(ValidationError, match="frozen"):
            setattr(policy, field, value)
    assert policy == ActivationPolicy() and hash(policy) == hash(ActivationPolicy())


def test_of() -> None:
    """A policy is passed through, nothing is the default, anything else is refused by type."""
    policy = ActivationPolicy(mode="all")
    assert ActivationPolicy.of(policy) is policy
    assert ActivationPolicy.of(None) == ActivationPolicy.of({}) == ActivationPolicy()
    for wrong in ("all", 1, ["mode"], DEFAULTS.items()):
        with pytest.raises(TypeError, match="Expected policy to be an ActivationPolicy or a mapping"):
            ActivationPolicy.of(wrong)  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    policy = ActivationPolicy(min_nbytes="3MiB", disk_nbytes="5GiB", engine="threads", checksum=True)
    assert ActivationPolicy.model_validate_json(policy.model_dump_json()) == policy


def test_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable per field; others, and those of other programs, are left alone."""
    environment = {
        "SSDTRAIN_ENABLED": "0",
        "SSDTRAIN_MIN_NBYTES": "2MiB",
        "SSDTRAIN_MODE": "all",
        "SSDTRAIN_STAGING_NBYTES": "32MiB",
        "SSDTRAIN_PREFETCH_NBYTES": "0",
        "SSDTRAIN_DISK_NBYTES": "1GiB",
        "SSDTRAIN_ENGINE": "threads",
        "SSDTRAIN_IO_TIMEOUT_SECONDS": "2.5",
        "SSDTRAIN_CHECKSUM": "true",
    }
    expected = ActivationPolicy(
        enabled=False,
        min_nbytes=2 << 20,
        mode="all",
        staging_nbytes=32 << 20,
        prefetch_nbytes=0,
        disk_nbytes=1 << 30,
        engine="threads",
        io_timeout_seconds=2.5,
        checksum=True,
    )
    assert ActivationPolicy.from_environment(environment) == expected
    assert ActivationPolicy.from_environment({"MODE": "all", "SSDTRAIN_NO_CPP": "1"}) == ActivationPolicy()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ActivationPolicy.from_environment() == expected


def test_from_environment_refuses() -> None:
    with pytest.raises(ValueError, match="engine"):
        ActivationPolicy.from_environment({"SSDTRAIN_ENGINE": "gds"})


def test_no_directory() -> None:
    with pytest.raises(ValueError, match="Expected one directory or several, got none"):
        ssdtrain.offload_activations([])


def test_enabled_and_engine_are_obeyed(tmp_path: Path) -> None:
    """The other fields' effects are tested where they act."""
    offload = ssdtrain.offload_activations(tmp_path, policy={"engine": "python"})
    assert offload.policy.engine == offload.stats.engine == "python"
    offload.close()
    assert ssdtrain.offload_activations(tmp_path, policy={"enabled": False}).stats.engine == ""
