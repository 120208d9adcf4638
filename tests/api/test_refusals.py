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
