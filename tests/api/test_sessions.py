"""`ssdtrain.Offload`: one session for all features, and the section that says what it is to do."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import same_bits
from drives import Drive, fill
from torch import nn

import ssdtrain
from ssdtrain.api.section import Section
from ssdtrain.api.wrappers import rewrap, unwrap
from ssdtrain.store.saved_tensors import innermost_hooks

ACTIVATIONS = {"min_nbytes": 0, "mode": "all", "staging_nbytes": "64KiB"}
STATE = {"min_nbytes": 0, "staging_nbytes": "64KiB"}
EVERYTHING = {"activations": ACTIVATIONS, "parameters": STATE, "optimizer": STATE | {"chunk_nbytes": "8KiB"}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.fc(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return x


def model() -> nn.Module:
    return Model()


def train(module: nn.Module, optimizer: torch.optim.Optimizer, session: ssdtrain.Offload | None, steps: int = 3) -> Any:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 64, generator=generator)
        if session is None:
            loss = module(x).square().mean()
        else:
            with session:
                loss = module(x).square().mean()
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: value.clone() for name, value in module.state_dict().items()}


def test_a_loop_with_everything_offloaded(tmp_path: Path) -> None:
    plain = model()
    expected = train(plain, torch.optim.AdamW(plain.parameters()), None, 6)
    module = model()
    inner = torch.optim.AdamW(module.parameters())
    session = ssdtrain.Offload(tmp_path, **EVERYTHING)
    (optimizer,) = session.begin(module, inner)
    first = train(module, optimizer, session)
    assert session.stats is not None and session.stats.read_nbytes and "offloaded" in session.progress()
    assert all(stats.read_nbytes for stats in session.state_stats) and len(session.state_stats) == 2
    session.end()
    assert session.begin(module, optimizer) == (optimizer,)  # goes on with what is on the drive
    assert same_bits(expected[0][:3], first[0])
    session.close()
    assert list(tmp_path.iterdir()) == [] and innermost_hooks() is None
    inner.step()  # may be used again


def test_enter_and_leave_may_be_said_twice(tmp_path: Path) -> None:
    session = ssdtrain.Offload(tmp_path, activations=ACTIVATIONS)
    assert not session.enter() and innermost_hooks() is None  # nothing has begun
    session.begin(model())
    assert session.enter() and not session.enter()
    with session:
        pass
    assert innermost_hooks() is not None
    with torch.autograd.graph.save_on_cpu():
        session.leave()  # from under the hooks of others, which stay
        assert innermost_hooks() is not None
    assert innermost_hooks() is None
    session.leave()
    with session, session:
        assert innermost_hooks() is not None
    assert innermost_hooks() is None
    with torch.no_grad():
        assert not session.enter()
    session.enter()
    session.end()
    assert innermost_hooks() is None


def test_a_forward_that_raises_leaves(tmp_path: Path) -> None:
    class Raises(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    session = ssdtrain.Offload(tmp_path, activations=ACTIVATIONS)
    module = nn.Sequential(nn.Linear(4, 4), Raises(4, 4))
    session.begin(module)
    uncover = session.cover(module)
    with pytest.raises(KeyboardInterrupt):
        module(torch.ones(2, 4))
    assert innermost_hooks() is None
    copied = copy.deepcopy(module)
    assert copied.forward.__self__ is copied and "forward" not in vars(pickle.loads(pickle.dumps(model())))
    uncover()
    assert "forward" not in vars(module)
    session.close()


def test_what_fails_undoes_the_rest(tmp_path: Path) -> None:
    """The optimizer is refused after parameters have left: they are back."""
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    session = ssdtrain.Offload(tmp_path, **EVERYTHING)
    with pytest.raises(ValueError, match="needs no closure, got LBFGS"):
        session.begin(module, torch.optim.LBFGS(module.parameters()))
    assert same_bits(before, dict(module.state_dict())) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is not"):
        ssdtrain.parameter_offload(module)


def test_a_full_disk_is_said_before_training(small_tmpfs: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """State that has no room is refused, with all as it was."""
    fill(small_tmpfs.directory, 64 << 10)
    monkeypatch.setenv("SSDTRAIN_DIR", str(small_tmpfs.directory))
    monkeypatch.setenv("SSDTRAIN_OPTIMIZER", '{"min_nbytes": 0}')
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    session = ssdtrain.Offload()
    with pytest.raises(OSError, match="got a full file system") as caught:
        session.begin(module, optimizer)
    assert str(small_tmpfs.directory) in str(caught.value)
    module(torch.ones(4, 64)).sum().backward()
    optimizer.step()


def test_other_offloaders_are_refused(tmp_path: Path) -> None:
    session = ssdtrain.Offload(tmp_path)
    with pytest.raises(ValueError, match=r"got activation_offloading=True beside ssdtrain: turn activation_offloading"):
        session.begin(model(), switches={"activation_offloading": True, "else": False})
    with torch.autograd.graph.save_on_cpu(), pytest.raises(ValueError, match=r"save_on_cpu.*round training"):
        session.begin(model())
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    with pytest.raises(ValueError, match=r"OffloadWrapper round a layer.*activation_checkpointing_offload"):
        session.begin(nn.Sequential(offload_wrapper(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"got DataParallel.*start with torchrun"):
        session.begin(_parallel())


@pytest.mark.parametrize("name", ["checkpoint", "CheckpointFunction", "of the model", "of LLaMA-Factory"])
def test_checkpointing_by_unsloth_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It patches PyTorch, and Transformers' models may have what they call from before."""
    import torch.utils.checkpoint as theirs

    module = model()
    kinds = {"CheckpointFunction": type("UnslothCheckpointFunction", (theirs.CheckpointFunction,), {})}
    if name == "of the model":
        vars(module)["_gradient_checkpointing_func"] = functools.partial(unsloth_checkpoint, use_reentrant=False)
    elif name == "of LLaMA-Factory":
        apply = type("UnslothCheckpointing", (torch.autograd.Function,), {}).apply
        assigned = (*functools.WRAPPER_ASSIGNMENTS, "__self__")
        vars(module)["_gradient_checkpointing_func"] = functools.wraps(apply, assigned)(lambda *args: apply(*args))
    else:
        monkeypatch.setattr(theirs, name, kinds.get(name, unsloth_checkpoint))
    text = "pass use_gradient_checkpointing=True instead of 'unsloth'"
    with pytest.raises(ValueError, match=rf"(?i)unsloth_?checkpoint.* beside ssdtrain: {text}"):
        ssdtrain.Offload(tmp_path).begin(module)


def unsloth_checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None) -> Any:
    return function(*args)


def _parallel() -> nn.DataParallel[nn.Module]:
    found = nn.DataParallel(nn.Linear(2, 2))
    found.device_ids = [0, 1]
    return found


def test_step_in_backward_knows_the_last_backward(tmp_path: Path) -> None:
    """Two backwards a step, the second of which updates; a closure has both."""
    is_last = False

    def train_twice(module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        nonlocal is_last
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            x, y = torch.randn(2, 16, 64, generator=generator)

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                nonlocal is_last
                optimizer.zero_grad()
                is_last = False
                module(x).square().mean().backward()
                is_last = True
                loss = module(y).square().mean()
                loss.backward()
                return loss

            if step == 1:
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        return dict(module.state_dict())

    plain, ours = model(), model()
    expected = train_twice(plain, torch.optim.AdamW(plain.parameters()))
    session = ssdtrain.Offload(
        tmp_path, activations=False, optimizer=EVERYTHING["optimizer"] | {"step_in_backward": True}
    )
    (optimizer,) = session.begin(ours, torch.optim.AdamW(ours.parameters()), is_last=lambda: is_last)
    assert same_bits(expected, train_twice(ours, optimizer))
    session.close()


def test_the_norm_of_used_gradients_can_be_logged(tmp_path: Path) -> None:
    module = model()
    optimizer_policy = EVERYTHING["optimizer"] | {"step_in_backward": True}
    session = ssdtrain.Offload(tmp_path, activations=False, optimizer=optimizer_policy)
    (optimizer,) = session.begin(module, torch.optim.SGD(module.parameters(), momentum=0.9), reads_norms=True)
    plain = model()
    for each in (plain, module):
        each(torch.ones(4, 64)).square().mean().backward()
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), float("inf")) for m in (plain, module)]
    assert torch.equal(*norms)
    with pytest.raises(RuntimeError, match="used and freed"):
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-6)
    optimizer.step()
    session.close()


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_optimizers_in_wrappers() -> None:
    class AcceleratedOptimizer:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    inner, other = (torch.optim.SGD([nn.Parameter(torch.ones(1))]) for _ in range(2))
    wrapped = AcceleratedOptimizer(AcceleratedOptimizer(inner))
    assert unwrap(wrapped) is inner and unwrap(inner) is inner
    assert rewrap(wrapped, other) is wrapped and unwrap(wrapped) is other and rewrap(inner, other) is other


# -- the section -------------------------------------------------------------------------------------------------------


def test_ways_to_write_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Section(
        (str(tmp_path),),
        ssdtrain.ActivationPolicy(mode="all"),
        ssdtrain.ParameterPolicy(),
        ssdtrain.OptimizerPolicy(chunk_nbytes="1MiB"),  # type: ignore[arg-type]
        ("h.*",),
    )
    mapping = {
        "directory": str(tmp_path),
        "activations": {"mode": "all"},
        "parameters": {"blocks": ["h.*"]},
        "optimizer": {"chunk_nbytes": "1MiB"},
    }
    assert Section.of(mapping) == expected
    features = {name: value for name, value in mapping.items() if name != "directory"}
    assert ssdtrain.Offload(tmp_path, **features).section == expected
    as_json, as_yaml = tmp_path / "own.json", tmp_path / "own.yaml"
    as_json.write_text(json.dumps({"ssdtrain": mapping, "model": "..."}))
    as_yaml.write_text(
        f"directory: {tmp_path}\nactivations: {{mode: all}}\nparameters:\n  blocks: [h.*]\n"
        "optimizer:\n  chunk_nbytes: 1MiB\n"
    )
    assert Section.load(as_json) == Section.load(as_yaml) == expected
    variables = {
        "SSDTRAIN_DIR": str(tmp_path),
        "SSDTRAIN_MODE": "all",
        "SSDTRAIN_PARAMETERS": "yes",
        "SSDTRAIN_PARAMETERS_BLOCKS": "h.*",
        "SSDTRAIN_OPTIMIZER": '{"chunk_nbytes": "1MiB"}',
    }
    assert Section.from_environment(variables | {"SSDTRAIN_NO_CPP": "1", "HOME": "/"}) == expected
    assert Section.from_environment({"SSDTRAIN_CONFIG": str(as_yaml)}) == expected
    assert Section.from_environment({}) is None and Section.from_environment({"SSDTRAIN_DIR": ""}) is None
    monkeypatch.setenv("SSDTRAIN_DIR", f"{tmp_path}:{tmp_path}/b")
    found = Section.from_environment()
    assert found is not None and found.directories == (str(tmp_path), f"{tmp_path}/b")


def test_several_directories_are_written_in_one_way(tmp_path: Path) -> None:
    """In all places: a list, or a text with `:` between them; every one of them gets its part of what is offloaded."""
    a, b = (str(tmp_path / name) for name in "ab")
    for folder in (a, b):
        Path(folder).mkdir()
    both, listed = (a, b), f"{a}:{b}"
    assert Section.given(listed).directories == Section.given([a, b]).directories == both
    assert Section.of({"directory": listed}).directories == Section.of({"directory": [a, b]}).directories == both
    from_environment = Section.from_environment({"SSDTRAIN_DIR": listed})
    assert from_environment is not None and from_environment.directories == both
    # Two folders on the faster of two drives: each folder gets a third of what is offloaded.
    (tmp_path / "c").mkdir()
    session = ssdtrain.Offload(f"{listed}:{tmp_path}/c", activations=False, optimizer=STATE | {"chunk_nbytes": "8KiB"})
    net = model()
    (optimizer,) = session.begin(net, torch.optim.AdamW(net.parameters()))
    train(net, optimizer, session)
    in_use = [extents.in_use_nbytes for extents in inside.space(optimizer.store)._extents]
    assert len(in_use) == 3 and max(in_use) <= 2 * min(in_use) and min(in_use) > 0
    session.close()
    (tmp_path / "a:b").mkdir()
    assert Section.given(tmp_path / "x:y").directories == (f"{tmp_path}/x:y",)  # a path object is one
    assert Section.given(f"{tmp_path}/a:b").directories == (f"{tmp_path}/a:b",)  # its very name
    for name in ("run-14:30", "run:", "run::/x"):  # whose parts are no paths
        assert Section.given(f"{tmp_path}/{name}").directories == (f"{tmp_path}/{name}",)


def test_directories_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / "3of7"
    own.mkdir()
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Section.given("~/{local_rank}of{rank}").directories == (str(own),)
    with ssdtrain.offload_activations("~/{local_rank}of{rank}", ACTIVATIONS) as offload:
        model()(torch.ones(64, 64)).sum().backward()
    offload.close()
    module = ssdtrain.offload_parameters(model(), "~/{local_rank}of{rank}", STATE)
    ssdtrain.parameter_offload(module).close()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("LOCAL_RANK")
    assert Section.given("/{local_rank}of{rank}").directories == ("/0of0",)  # the only process
    (tmp_path / "{x}").mkdir()
    assert Section.given(tmp_path / "{x}").directories == (str(tmp_path / "{x}"),)  # its very name


@pytest.mark.parametrize(
    "variables, text",
    [
        ({"SSDTRAIN_DIRR": "/a"}, "got SSDTRAIN_DIRR. Did you mean SSDTRAIN_DIR"),
        ({"SSDTRAIN_OPTIMISER": "1"}, "got SSDTRAIN_OPTIMISER. Did you mean SSDTRAIN_OPTIMIZER"),
        ({"SSDTRAIN_MODE": "all"}, "to have a 'directory'"),
        ({"SSDTRAIN_DIR": "/a", "SSDTRAIN_MODE": "some"}, "mode"),
        ({"SSDTRAIN_DIR": "/a", "SSDTRAIN_OPTIMIZER": "{"}, "SSDTRAIN_OPTIMIZER to be true, false or the JSON"),
        ({"SSDTRAIN_DIR": "/a", "SSDTRAIN_OPTIMIZER": "0", "SSDTRAIN_OPTIMIZER_CHUNK_NBYTES": "1"}, "got it off"),
        ({"SSDTRAIN_DIR": "/a", "SSDTRAIN_CONFIG": "/b.json"}, "SSDTRAIN_CONFIG alone"),
    ],
)
def test_variables_that_are_refused(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=r"ssdtrain|SSDTRAIN") as caught:
        Section.from_environment(variables)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "section, text",
    [
        ({"directory": "/a", "optimizer": {"chunk_nbyte": 1}}, "'optimizer.chunk_nbyte'. Did you mean 'chunk_nbytes'?"),
        ({"directory": "/a", "optimizer": {"chunk_nbytes": 0}}, "fields of an OptimizerPolicy in 'optimizer'"),
        ({"directory": "/a", "parameters": {"blocks": "h"}}, "'parameters.blocks' to be a list of names"),
        ({"directory": "/a", "activations": {"directory": "/b"}}, "one 'directory'"),
        ({"activations": False, "optimizer": True}, "'optimizer' to have a 'directory'"),
        ({"directory": "/a", "parameters": 3}, "'parameters' to be true, false or a mapping"),
    ],
)
def test_sections_of_all_features_that_are_refused(section: object, text: str) -> None:
    with pytest.raises(ValueError, match="In the section 'ssdtrain'") as caught:
        Section.of(section)
    assert text in str(caught.value)


def test_a_file_that_is_no_section(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text("directory: /a")
    with pytest.raises(ValueError, match=r"Expected JSON in .*own.json, or a name that ends in .yaml"):
        Section.load(path)
    (tmp_path / "own.yaml").write_text("directory: /a\noptimiser: true\n")
    with pytest.raises(ValueError, match=r"got 'optimiser'\. Did you mean 'optimizer'"):
        Section.load(tmp_path / "own.yaml")
