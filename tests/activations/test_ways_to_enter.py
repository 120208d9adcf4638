"""Options by name, and a context that decorates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import send

import ssdtrain
from ssdtrain.policy import ActivationPolicy

pytestmark = pytest.mark.cpu_only
SMALL = {"min_nbytes": 0, "staging_nbytes": 64 * 1024, "decline_below_nbytes": 0}


def test_options_by_name_go_before_the_policy(tmp_path: Path) -> None:
    for policy in (SMALL, ActivationPolicy.of(SMALL)):
        offload = ssdtrain.offload_activations(tmp_path, policy, min_nbytes="4MiB", mode="all")
        assert (offload.policy.min_nbytes, offload.policy.mode) == (4 << 20, "all")
        assert offload.policy.staging_nbytes == 64 * 1024
        offload.close()


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_bytes"):
        ssdtrain.offload_activations(tmp_path, min_bytes="4MiB")


def test_it_decorates_a_function(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, SMALL, mode="all")
    x = torch.randn(64, 64, requires_grad=True)

    @offload
    def loss(times: int) -> torch.Tensor:
        """Enters itself, too."""
        y = x.exp() if times == 0 else loss(times - 1).sin()
        send()
        return y

    for _ in range(2):
        x.grad = None
        loss(2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.autograd.grad(x.exp().sin().sin().sum(), x)[0])
    assert offload.stats.read_nbytes > 0, str(offload.stats)
    offload.close()
