"""Memory that the user sees: what the process takes, what is said of it, and what gains nothing and is left alone."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssdtrain

KIB, MIB = 1 << 10, 1 << 20

# Its saved tensors, about 96 MiB, lie between others that are freed: what a heap keeps shows.
TRAINING = """
import json, sys, tempfile, torch, ssdtrain
from contextlib import nullcontext
from torch import nn

def status(field):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(field + ":"))

torch.set_num_threads(1)
imported = ssdtrain.ActivationOffload
policy = json.loads(sys.argv[1])
blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(int(sys.argv[3]))]
model = nn.Sequential(*blocks)
offload = ssdtrain.offload_activations(sys.argv[2], policy=policy) if policy is not None else nullcontext()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
with offload:
    for _ in range(4):
        model(torch.randn(2048, 64)).square().mean().backward()
print(json.dumps({"rss": status("VmHWM") - before, "stats": offload.stats.as_dict() if policy is not None else {}}))
"""


def training(tmp_path: Path, policy: dict[str, Any] | None, num_blocks: int) -> dict[str, Any]:
    command = [sys.executable, "-c", TRAINING, json.dumps(policy), str(tmp_path), str(num_blocks)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_process_gets_smaller_by_what_leaves(tmp_path: Path) -> None:
    """glibc keeps what is freed between tensors that live on; without its being met RSS would be as without us."""
    plain = training(tmp_path, None, 24)["rss"]
    policy = {"mode": "all", "min_nbytes": "256KiB", "staging_nbytes": "4MiB", "prefetch_nbytes": "8MiB"}
    ours = training(tmp_path, policy, 24)
    saved = ours["stats"]["without_nbytes"]
    assert saved > 90 * MIB
    assert plain - ours["rss"] > 0.6 * saved, (plain, ours["rss"], saved)
    assert ours["stats"]["peak_memory_nbytes"] < 0.4 * saved


def test_little_is_left_alone_and_said_why(tmp_path: Path) -> None:
    plain = training(tmp_path, None, 2)["rss"]
    ours = training(tmp_path, {"min_nbytes": "64KiB"}, 2)
    stats = ours["stats"]
    assert ours["rss"] <= plain + 5 * MIB
    assert stats["num_offloaded"] == 0 and stats["peak_staging_nbytes"] == 0
    assert "nothing to gain; offloading begins to pay at about 32.0 MiB here" in stats["plan"]


def blocks(num: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(num)])


SMALL = {"min_nbytes": 32 * KIB, "staging_nbytes": MIB}


def test_what_the_user_holds_is_left_alone_after_two_steps(tmp_path: Path) -> None:
    """Hidden states kept until the next step are in memory anyway: to write them frees nothing."""
    layers = blocks(8)
    with ssdtrain.offload_activations(tmp_path, policy=SMALL) as offload:
        written = []
        for _ in range(6):
            x = torch.randn(512, 64)
            hidden = [x := layer(x) for layer in layers]
            x.square().sum().backward()
            written.append(offload.stats.offloaded_nbytes)
        del hidden
    held = 512 * 64 * 4
    skipped = offload.stats.skipped["outlives its graph"]
    assert skipped.count >= 4 * 7 and skipped.nbytes >= 4 * 7 * held  # from the third step on
    per_step = [after - before for before, after in itertools.pairwise(written)]
    assert all(nbytes <= per_step[0] - 7 * held for nbytes in per_step[2:]), per_step


def test_what_is_held_no_longer_travels_again(tmp_path: Path) -> None:
    layers = blocks(4)
    with ssdtrain.offload_activations(tmp_path, policy=SMALL | {"min_nbytes": 64 * KIB}) as offload:
        for step in range(300):
            x = torch.randn(512, 64)
            hidden = [x := layer(x) for layer in layers]
            if step >= 4:
                hidden.clear()
            x.square().sum().backward()
        before = offload.stats.skipped["outlives its graph"].count
        for _ in range(4):
            x = torch.randn(512, 64)
            for layer in layers:
                x = layer(x)
            x.square().sum().backward()
        assert offload.stats.skipped["outlives its graph"].count <= before + 4  # what comes out last is held here


class Cast(nn.Module):
    """Computes in bfloat16 with weights that it casts itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(512, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16)).float()


def test_casts_of_weights_by_hand_count_and_travel(tmp_path: Path) -> None:
    """Nobody keeps such a copy but autograd: it is memory like any other."""
    model = nn.Sequential(*[Cast() for _ in range(4)])
    x = torch.randn(16, 512)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with ssdtrain.offload_activations(tmp_path, policy=SMALL | {"mode": "all"}) as offload:
        loss = model(x).square().sum()
        assert offload.stats.without_nbytes >= 3 * 512 * 512 * 2  # the first one's input needs no gradient
        loss.backward()
    assert offload.stats.offloaded_nbytes >= 2 * 512 * 512 * 2
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and grad is not None and torch.equal(parameter.grad, grad)


def test_the_peak_is_the_highest_of_the_run_and_names_its_step(tmp_path: Path) -> None:
    layers = nn.Sequential(*blocks(8))
    with ssdtrain.offload_activations(tmp_path, policy={"min_nbytes": 32 * KIB}) as offload:  # nothing moves
        for rows in (512, 512, 2048, 512, 512):
            layers(torch.randn(rows, 64)).square().sum().backward()
        layers(torch.randn(512, 64)).square().sum().backward()
    stats = offload.stats
    assert stats.peak_memory_step == 3 and stats.num_steps == 5
    assert stats.last_memory_nbytes < stats.peak_memory_nbytes
    assert stats.peak_memory_nbytes == stats.peak_device_nbytes == stats.without_nbytes
    assert stats.without_nbytes >= 8 * 2048 * 64 * 4
    assert stats.peak_process_nbytes > stats.peak_memory_nbytes
    text = str(stats)
    assert "in step 3" in text and "without ssdtrain (estimated)" in text and "last step peak" in text
    assert stats._repr_html_().startswith("<pre>ssdtrain:")


@pytest.mark.parametrize("setting", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_decided_for_glibc_stays(setting: str) -> None:
    from ssdtrain.devices.host_allocator import has_decided

    assert has_decided({setting: "glibc.malloc.mmap_threshold=1"})
    assert not has_decided({"GLIBC_TUNABLES": "glibc.cpu.x=1"}) and not has_decided({})
