"""What a user sees of the package in a prompt: few names, and of every object one line that says its state."""

from __future__ import annotations

from pathlib import Path

import torch

import ssdtrain
from ssdtrain.api import types
from ssdtrain.stats import nbytes_text


def test_at_most_twelve_names_are_listed_and_the_others_still_found() -> None:
    assert len(ssdtrain.__all__) <= 12
    assert {name for name in dir(ssdtrain) if not name.startswith("__")} == set(ssdtrain.__all__)
    for name in types.__all__:
        assert getattr(ssdtrain, name) is getattr(types, name)


def test_every_object_says_in_one_line_what_state_it_is_in(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
    activations, blocks = {"min_nbytes": 0, "mode": "all"}, {"blocks": ["0", "1", "2"]}
    session = ssdtrain.Offload(tmp_path, activations=activations, parameters=blocks, optimizer=True)
    assert repr(session) == f"Offload(not begun, {tmp_path}, activations, parameters, optimizer)"
    (optimizer,) = session.begin(model, torch.optim.AdamW(model.parameters()))
    offload, parameters = session.activations, ssdtrain.parameter_offload(model)
    assert offload is not None and repr(offload).startswith(f"ActivationOffload(left, {tmp_path}, 0 steps, 0 B ")
    for _ in range(2):
        with session:
            assert repr(offload).startswith("ActivationOffload(entered, ")
            loss = model(torch.ones(64, 256)).tanh().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = offload.stats
    held = [offload, parameters, optimizer, session, stats, *session.state_stats]
    assert f"{nbytes_text(stats.offloaded_nbytes)} offloaded" in repr(offload)
    assert "768.0 KiB in 3 parameters offloaded" in repr(parameters)
    assert repr(optimizer).startswith("OffloadedAdamW(open, ")
    assert "1.5 MiB of state in 6 tensors offloaded" in repr(optimizer)
    assert repr(stats).startswith("Stats(") and all(repr(part) in repr(session) for part in held[:3])
    assert [text for text in map(repr, held) if "\n" in text or len(text.replace(str(tmp_path), "")) > 400] == []
    session.close()
    assert "(closed, " in repr(offload) and "(closed, " in repr(optimizer) and "(closed, " in repr(parameters)


def test_a_policy_shows_what_was_asked_and_can_be_pasted() -> None:
    assert repr(ssdtrain.ActivationPolicy()) == "ActivationPolicy()"
    policy = ssdtrain.ActivationPolicy(min_nbytes="4MiB", mode="all", disk_nbytes=10**9 + 1, host_nbytes=0)
    shown = repr(policy)
    assert shown == "ActivationPolicy(min_nbytes='4MiB', mode='all', disk_nbytes=1000000001, host_nbytes=0)"
    assert eval(shown, vars(ssdtrain)) == policy
