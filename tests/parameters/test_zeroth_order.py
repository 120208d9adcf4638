"""MeZO with streamed parameters: losses and parameters of the recipe are those of plain MeZO, to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from folders import RECIPES
from forks import Forks
from state_tools import check_same

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig

SCRIPT = RECIPES / "zeroth_order" / "mezo.py"
SIZE = ["--layers", "3", "--width", "128", "--heads", "2", "--batch", "2", "--sequence", "16", "--steps", "4"]


def run(forks: Forks, *arguments: str) -> list[str]:
    (done,) = forks.run([SCRIPT, *SIZE, *arguments])
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" | ", 1)[0] for line in done.stdout.splitlines()]
    return [line for line in lines if line.startswith(("step", "parameters", "ssdtrain"))]


def test_streamed_is_plain(forks: Forks, tmp_path: Path) -> None:
    """From a pretrained checkpoint; every block was on the drive."""
    torch.manual_seed(5)
    checkpoint = str(tmp_path / "gpt.safetensors")
    ssdtrain.save_safetensors(GPT(GPTConfig(3, 128, 2, 16)), checkpoint)
    streamed = run(forks, "--dir", str(tmp_path), "--checkpoint", checkpoint)
    plain = run(forks, "--no-offload", "--checkpoint", checkpoint)
    (told,) = [line for line in streamed if line.startswith("ssdtrain")]
    assert "12 tensors" in told  # four large ones of each block
    check_same([line for line in streamed if line != told], plain)
    assert len(plain) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.safetensors"]
