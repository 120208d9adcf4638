"""What is refused is said in the words of who wrote it: field or argument, and no link to other pages."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import ssdtrain

MODEL = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(2)))


@pytest.mark.parametrize("engine", ["auto", "threads", "python"])
def test_memory_that_is_not_there_names_the_field(tmp_path: Path, engine: Any) -> None:
    wants = {"staging_nbytes": "900TiB", "engine": engine}
    for open_it in (
        lambda: ssdtrain.offload_activations(tmp_path, wants),
        lambda: ssdtrain.offload_parameters(MODEL, tmp_path, wants, ["0", "1"]),
        lambda: ssdtrain.offload_optimizer(torch.optim.AdamW(MODEL.parameters()), tmp_path, wants),
    ):
        with pytest.raises(OSError, match="staging_nbytes=900TiB: Cannot allocate memory; lower it") as caught:
            open_it()
        assert caught.value.errno == errno.ENOMEM


def test_a_model_in_the_place_of_something_else_is_said_so(tmp_path: Path) -> None:
    words = r"got a model \(Sequential\): it stands where the directory belongs"
    anything: Any = MODEL
    with pytest.raises(TypeError, match=words):
        ssdtrain.offload_activations(anything)
    with pytest.raises(TypeError, match=words):
        ssdtrain.Offload(anything)
    with pytest.raises(TypeError, match=words):
        ssdtrain.offload_optimizer(torch.optim.AdamW(MODEL.parameters()), anything)
    with pytest.raises(TypeError, match=r"got an optimizer \(SGD\): it stands where the directory belongs"):
        ssdtrain.offload_parameters(MODEL, torch.optim.SGD(MODEL.parameters()), blocks=["0"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a model \(Sequential\): pass it as model="):
        ssdtrain.offload_activations(tmp_path, anything)


def test_arguments_in_the_wrong_place_are_said_so(tmp_path: Path) -> None:
    """And keywords of one function that another does not have."""
    anything: Any = str(tmp_path)
    with pytest.raises(TypeError, match=r"Optimizer first, then the directory, got str in its place"):
        ssdtrain.offload_optimizer(anything, tmp_path)
    with pytest.raises(TypeError, match=r"got str: pass it first, then the directory, as in offload_parameters\(model"):
        ssdtrain.offload_parameters(anything, tmp_path)
    with pytest.raises(TypeError, match=r"Expected model to be a torch.nn.Module, got str"):
        ssdtrain.offload_activations(tmp_path, model=anything)
    with pytest.raises(TypeError, match=r"got 'mode': fields of a policy stand in one of them, activations={'mode'"):
        ssdtrain.Offload(tmp_path, mode="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got 'optimiser': did you mean optimizer="):
        ssdtrain.Offload(tmp_path, optimiser=True)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError) as caught, ssdtrain.offload_activations("s3://bucket/folder"):
        pass
    assert str(caught.value.filename).endswith("s3:/bucket/folder")


@pytest.mark.parametrize(
    "fields",
    [{"recompute": "auto"}, {"disk_nbytes": "64KiB"}, {"delayed_update": True}, {"master_weights": True}],
    ids=str,
)
def test_fields_that_do_not_go_together_link_nowhere(fields: Any) -> None:
    kind = ssdtrain.OptimizerPolicy if next(iter(fields)) in ("delayed_update", "master_weights") else None
    with pytest.raises(ValidationError, match=r"\n  Expected ") as caught:
        (kind or ssdtrain.ActivationPolicy)(**fields)
    assert "http" not in str(caught.value) and "Value error" not in str(caught.value)


def test_a_bad_value_names_its_field_and_links_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        ssdtrain.offload_activations(tmp_path, {"min_nbytes": "4 {quux}", "mode": 3})
    text = str(caught.value)
    assert "http" not in text and "Value error" not in text
    assert "min_nbytes\n  Expected a size such as 1048576, '64KiB', '16MiB' or '1.5GB', got '4 {quux}'" in text
    assert [error["loc"] for error in caught.value.errors()] == [("min_nbytes",), ("mode",)]
    with pytest.raises(ValidationError, match=r"got 'min_byte'\. Did you mean 'min_nbytes'") as caught:
        ssdtrain.ActivationPolicy(min_byte=1)  # type: ignore[call-arg]
    assert "http" not in str(caught.value)
