"""Parameters on the drive: equal to the bit, in memory only while they are used, never seen with wrong values."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from drives import Drive
from state_tools import (
    EAGER_STATE,
    MLP,
    MODELS,
    WIDTH,
    adamw,
    batch,
    check_same,
    check_same_state,
    model_of,
    train,
    trainable,
    values,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint

import ssdtrain


def offloaded(
    model: nn.Module, folder: Path, blocks: list[str] | None = None, **policy: Any
) -> ssdtrain.ParameterOffload:
    assert ssdtrain.offload_parameters(model, folder, EAGER_STATE | policy, blocks) is model
    return ssdtrain.parameter_offload(model)


def full_nbytes(model: nn.Module) -> int:
    """Memory of the storages that parameters of blocks have now."""
    owner = ssdtrain.parameter_offload(model)
    return sum(r.nbytes for r in inside.working_set(owner) if r.storage is not None)


def block_nbytes(model: nn.Module) -> int:
    """The largest block."""
    owner = ssdtrain.parameter_offload(model)
    return max(sum(r.nbytes for r in block.records) for block in inside.working_set(owner).blocks)


# -- equal to the bit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["plain", "offloaded", "in backward"])
@pytest.mark.parametrize("has_activations", [False, True], ids=["", "activations"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_is_equal_to_the_bit(kind: str, has_activations: bool, optimizer: str, tmp_path: Path) -> None:
    """Ten steps; names and parameter objects are the same before and after."""
    plain = model_of(kind)
    expected = adamw(trainable(plain))
    losses = train(plain, expected)
    model = model_of(kind)
    before = dict(model.named_parameters())
    owner = offloaded(model, tmp_path)
    steps: torch.optim.Optimizer = adamw(trainable(model))
    if optimizer != "plain":
        policy = EAGER_STATE | {"chunk_nbytes": 40_000, "step_in_backward": optimizer == "in backward"}
        steps = ssdtrain.offload_optimizer(steps, tmp_path, policy)
    check_same(train(model, steps, activations=tmp_path if has_activations else None), losses)
    check_same(values(model), values(plain))
    check_same_state(steps.state_dict(), expected.state_dict())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert owner.stats.read_nbytes > 0, str(owner.stats)
    owner.close()
    check_same(values(model), values(plain))
    check_same(train(model, steps, 2, first=10), train(plain, expected, 2, first=10))


def test_state_dicts_of_distributed_checkpoints(tmp_path: Path) -> None:
    """Asked which parallelisms the module has, its parameters' guard took the question for the wish to shard it."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), adamw(model.parameters())
    owner = offloaded(model, tmp_path)
    for _ in range(2):
        check_same(train(model, optimizer, 2), train(plain, expected, 2))
        states = get_state_dict(model, optimizer), get_state_dict(plain, expected)
        check_same(states[0], states[1])
        for pair, state in zip(((model, optimizer), (plain, expected)), states, strict=True):
            set_state_dict(*pair, model_state_dict=state[0], optim_state_dict=state[1])
    owner.close()


@pytest.mark.parametrize("optimizer", ["plain", "offloaded"])
def test_save_and_resume(optimizer: str, tmp_path: Path) -> None:
    """state_dict through torch.save, to an offloaded and to a plain model."""
    plain = model_of("gpt")
    expected = adamw(plain.parameters())
    first, rest = train(plain, expected, 4), train(plain, expected, 4, first=4)
    model = model_of("gpt")
    offloaded(model, tmp_path)
    steps: torch.optim.Optimizer = adamw(model.parameters())
    if optimizer == "offloaded":
        steps = ssdtrain.offload_optimizer(steps, tmp_path, EAGER_STATE)
    check_same(train(model, steps, 4), first)
    file = io.BytesIO()
    torch.save([model.state_dict(), steps.state_dict()], file)
    for is_offloaded in (False, True):
        again = model_of("gpt")
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        if is_offloaded:
            offloaded(again, tmp_path)
        resumed = adamw(again.parameters())
        state, optimizer_state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        again.load_state_dict(state)
        resumed.load_state_dict(optimizer_state)
        check_same(train(again, resumed, 4, first=4), rest)


class Twice(nn.Module):
    """The same blocks run twice in a forward, one of them never."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP.Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1, 0, 1, 1):
            x = self.blocks[i](x)
        return x.square().mean()


@pytest.mark.parametrize("how", ["twice", "no_grad", "inference", "accumulate", "graphs", "retain", "double"])
def test_ways_of_using_a_module(how: str, tmp_path: Path) -> None:
    """Each way gives the same numbers, twice over, with a change of the parameters in between."""

    def use(model: nn.Module) -> list[Any]:
        x = batch(0).requires_grad_()
        if how == "twice":
            model(x).backward()
        elif how == "no_grad":
            with torch.no_grad():
                return [model(x), model(x)]
        elif how == "inference":
            with torch.inference_mode():
                return [model(x).clone()]
        elif how == "accumulate":
            model(x).backward()
            model(batch(1)).backward()
        elif how == "graphs":  # two graphs alive, the older one first
            losses = [model(x), model(batch(1))]
            for loss in losses:
                loss.backward()
        elif how == "retain":
            loss = model(x)
            loss.backward(retain_graph=True)
            loss.backward()
        elif how == "double":
            (grad,) = torch.autograd.grad(model(x), x, create_graph=True)
            grad.square().sum().backward()
        found = [x.grad, *(p.grad for p in model.parameters())]
        return [g for g in found if g is not None]

    torch.manual_seed(0)
    model: nn.Module = Twice() if how == "twice" else model_of("mlp")
    plain = copy.deepcopy(model)
    offloaded(model, tmp_path)
    for _ in range(2):
        check_same(use(model), use(plain))
        for module in (model, plain):
            steps = torch.optim.SGD(module.parameters(), lr=0.1)
            steps.step()
            steps.zero_grad()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_checkpointing(where: str, use_reentrant: bool, tmp_path: Path) -> None:
    """Recomputed blocks find their parameters, whether the checkpoint is around the block or inside it."""

    class Inside(MLP.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Inside() if where == "inside" else MLP.Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + torch.zeros((), requires_grad=True)  # reentrant checkpoints want an input with a gradient
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if where == "around" else block(x)
            return x.square().mean()

    torch.manual_seed(0)
    plain = Model()
    model = copy.deepcopy(plain)
    losses = train(plain, adamw(plain.parameters()), 4)
    offloaded(model, tmp_path)
    policy = EAGER_STATE | {"step_in_backward": True, "chunk_nbytes": 1}
    check_same(train(model, ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path, policy), 4), losses)
    check_same(values(model), values(plain))


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_copies_are_made_again(cache_enabled: bool, tmp_path: Path) -> None:
    """What autograd saves of autocast's bfloat16 copies is not kept: it is cast again in backward, to the same bits."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            with torch.autocast(torch.get_default_device().type, torch.bfloat16, cache_enabled=cache_enabled):
                loss = model(batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    plain, model = model_of("mlp"), model_of("mlp")
    losses = run(plain)
    offloaded(model, tmp_path)
    check_same(run(model), losses)
    check_same(values(model), values(plain))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, cache_enabled=False):
        loss = model(batch(0))
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    copies = [t for t in tensors if t.dtype is torch.bfloat16 and t.shape == (96, 48)]
    assert copies == []
    loss.backward()


def test_frozen_parameters_are_written_once(tmp_path: Path) -> None:
    model = model_of("lora")
    owner = offloaded(model, tmp_path, min_nbytes=WIDTH * WIDTH * 4)  # the bases alone
    owner.flush()
    written = owner.stats.written_nbytes
    assert owner.stats.away_nbytes == 4 * WIDTH * WIDTH * 4
    train(model, adamw(trainable(model)), 4)
    assert owner.stats.written_nbytes == written


def test_an_in_place_change_between_forward_and_backward_is_an_error(tmp_path: Path) -> None:
    """As without us: autograd has the values of forward or raises."""
    model = model_of("mlp")
    owner = offloaded(model, tmp_path)
    loss = model(batch(0).requires_grad_())
    with owner.gathered("blocks.1.*"), torch.no_grad():
        for parameter in model.blocks[1].parameters():  # type: ignore[union-attr]
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_a_few_blocks(tmp_path: Path) -> None:
    """Full at once: two blocks, see the Note; after what looking at every weight from outside brought has left."""
    model = MLP(12)
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    one = block_nbytes(model)
    assert full_nbytes(model) == 0
    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: seen.append(full_nbytes(model)))
            module.weight.register_post_accumulate_grad_hook(lambda _: seen.append(full_nbytes(model)))
    for _ in range(4):
        model(batch(0).requires_grad_()).backward()
    assert len(seen) == 4 * 2 * 24
    in_forward, in_backward = zip(*((seen[i : i + 24], seen[i + 24 : i + 48]) for i in range(96, 192, 48)), strict=True)
    assert max(max(found) for found in in_forward) <= 2 * one  # with the one that the last backward ended with
    assert max(max(found) for found in in_backward) <= 2 * one
    owner.flush()
    assert full_nbytes(model) == 0


def test_prefetch_follows_the_learned_order(tmp_path: Path) -> None:
    """After one pass every block but those at the start is read ahead, and never beyond the budget."""
    model = MLP(8)
    owner = offloaded(model, tmp_path, prefetch_nbytes=3 * 2 * 4 * 2 * WIDTH * WIDTH)
    x = batch(0).requires_grad_()
    model(x).backward()
    before = owner.stats
    for _ in range(3):
        model(x).backward()
    after = owner.stats
    on_demand = after.num_demand_reads - before.num_demand_reads
    ahead = after.num_prefetched - before.num_prefetched
    assert ahead > 10 * on_demand, str(after)


def test_peaks_and_stays_are_told(tmp_path: Path) -> None:
    model = model_of("tied")
    owner = offloaded(model, tmp_path)
    stays = owner.stats.stays
    assert stays["outside the blocks"].nbytes > 0 and stays["smaller than min_nbytes"].count > 0
    assert owner.stats.away_nbytes + sum(s.nbytes for s in stays.values()) == sum(p.nbytes for p in model.parameters())
    assert json.dumps(owner.stats.as_dict())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn]
)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Frozen weights of any dtype come back to the bit; their placeholders are NaN where there is one."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            value = torch.randint(0, 2, (64, 64)).to(torch.float32).to(dtype)
            self.weight = nn.Parameter(value, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight.to(torch.complex64).sum().abs()

    torch.manual_seed(0)
    model = nn.Sequential(Holder(), Holder())
    expected = model(torch.zeros(3))
    offloaded(model, tmp_path, ["*"])
    away = next(iter(model.parameters()))
    if dtype.is_floating_point or dtype.is_complex:
        with torch._C.DisableTorchFunctionSubclass():
            assert away.to(torch.complex64 if dtype.is_complex else torch.float32).isnan().all()
    for _ in range(2):
        assert torch.equal(model(torch.zeros(3)), expected)


def test_plain_optimizers_with_closures(tmp_path: Path) -> None:
    """Fused kernels and LBFGS run their closure inside the step: the parameters are there all the same."""
    for make in (
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, fused=True),
        lambda p: torch.optim.LBFGS(p, max_iter=3),
    ):
        plain, model = model_of("mlp"), model_of("mlp")
        offloaded(model, tmp_path)
        for module in (plain, model):
            optimizer = make(module.parameters())

            def closure(module: nn.Module = module, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = module(batch(0))
                loss.backward()
                return loss

            for _ in range(3):
                optimizer.step(closure)
        check_same(values(model), values(plain))


def test_changes_through_data(tmp_path: Path) -> None:
    """Behind every version counter, in place or with other data: kept, wherever it is done."""
    model = model_of("mlp")
    owner = offloaded(model, tmp_path)
    model.apply(lambda m: m.weight.data.fill_(0.5) if isinstance(m, nn.Linear) else None)  # type: ignore[union-attr,operator]
    owner.flush()
    assert all((value == 0.5).all() for name, value in values(model).items() if "weight" in name)
    with owner.gathered():
        vector = torch.arange(sum(p.numel() for p in model.parameters())).float()
        nn.utils.vector_to_parameters(vector, model.parameters())
    assert torch.equal(torch.cat([value.flatten() for value in values(model).values()]), vector)
    for p in model.parameters():
        p.data = torch.full(p.shape, 3.0)
    model(batch(0))
    owner.flush()
    assert all((value == 3).all() for value in values(model).values())
    owner.close()
    assert all((p == 3).all() for p in model.parameters())


def test_data_inside_a_block(tmp_path: Path) -> None:
    """`weight.data` in a forward is saved without the parameter's counter, and is no change of it."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.linear(x, self.f.weight.data)

    plain = nn.Sequential(*(Frozen() for _ in range(3)))
    model = copy.deepcopy(plain)
    offloaded(model, tmp_path, ["*"])
    x, y = batch(0).requires_grad_(), batch(0).requires_grad_()
    model(x).sum().backward()
    plain(y).sum().backward()
    check_same(x.grad, y.grad)


def test_closing_at_any_time(tmp_path: Path) -> None:
    """Between forward and backward, inside `gathered`: the graph and the block go on with what is in memory."""
    plain, model = model_of("mlp"), model_of("mlp")
    owner = offloaded(model, tmp_path)
    loss = model(batch(0))
    owner.close()
    loss.backward()
    plain(batch(0)).backward()
    check_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    owner = offloaded(model, tmp_path)
    with owner.gathered():
        owner.close()
    check_same(values(model), values(plain))


def test_flush_in_a_forward(tmp_path: Path) -> None:
    """Blocks that run stay, and what they compute is right."""
    plain, model = model_of("mlp"), model_of("mlp")
    owner = offloaded(model, tmp_path)
    for module in model.blocks:  # type: ignore[union-attr]
        module.up.register_forward_hook(lambda *_: owner.flush())
    check_same(train(model, adamw(model.parameters()), 3), train(plain, adamw(plain.parameters()), 3))


def test_an_interrupt_in_a_forward(tmp_path: Path) -> None:
    """PyTorch runs no hooks after Ctrl-C: the next forward cleans up, and nothing of ours is left on the thread."""
    from ssdtrain.store.saved_tensors import innermost_hooks

    plain, model = model_of("mlp"), model_of("mlp")
    owner = offloaded(model, tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[1].up.register_forward_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        model(batch(0))
    handle.remove()
    owner.flush()
    check_same(train(model, adamw(model.parameters()), 3), train(plain, adamw(plain.parameters()), 3))
    assert innermost_hooks() is None
    owner.flush()
    assert full_nbytes(model) == 0


def test_blocks_whose_parts_are_called(tmp_path: Path) -> None:
    """Their own forward never runs: they come and go all the same."""

    class Outer(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block.down(nn.functional.gelu(block.up(x)))  # type: ignore[union-attr,operator]
            return x.square().mean()

    torch.manual_seed(0)
    plain = Outer(8)
    model = copy.deepcopy(plain)
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    check_same(
        train(model, ssdtrain.offload_optimizer(adamw(model.parameters()), owner), 3),
        train(plain, adamw(plain.parameters()), 3),
    )
    with torch.no_grad():
        for _ in range(5):
            model(batch(0))
    assert full_nbytes(model) <= 2 * block_nbytes(model)
    assert not inside.working_set(owner)._gathered


def test_loading_what_does_not_fit(tmp_path: Path) -> None:
    """A shape that differs leaves a parameter without a value; values under a graph raise; assign=True is refused."""
    with torch.device("meta"):
        empty = MLP()
    offloaded(empty, tmp_path)
    state = model_of("mlp").state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        empty.load_state_dict({name: value[:1] for name, value in state.items()}, strict=False)
    with pytest.raises(RuntimeError, match="built on the meta device"):
        empty.blocks[0](batch(0))  # type: ignore[operator]
    model = model_of("mlp")
    owner = offloaded(model, tmp_path)
    with pytest.raises(RuntimeError, match="assign=False"):
        model.load_state_dict(state, assign=True)
    loss = model(batch(0))
    for name, p in model.named_parameters():
        if hasattr(p, "_ssdtrain_owner"):
            owner.fill(p, state[name])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- use outside the blocks --------------------------------------------------------------------------------------------


def test_parameters_used_outside_their_block(tmp_path: Path) -> None:
    """A weight taken out of a block that does not run, a part of a block called alone: they come, and leave again."""

    class Model(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x, self.blocks[2].up.weight)[..., :WIDTH]  # type: ignore[arg-type,union-attr]
            x = self.blocks[1].down(self.blocks[1].up(x))  # type: ignore[operator,union-attr]
            return super().forward(x)

    torch.manual_seed(0)
    plain = Model()
    model = copy.deepcopy(plain)
    losses = train(plain, adamw(plain.parameters()), 4)
    owner = offloaded(model, tmp_path)
    optimizer = ssdtrain.offload_optimizer(adamw(model.parameters()), owner)
    check_same(train(model, optimizer, 4), losses)
    check_same(values(model), values(plain))
    assert full_nbytes(model) <= 3 * block_nbytes(model)


def test_a_penalty_beside_the_model(tmp_path: Path) -> None:
    """Autograd has a parameter itself, taken outside every forward: it stays until that graph has been used."""

    def run(model: Any) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            before = model.blocks[3].up.weight.square().sum()
            loss = model(batch(step)) + 1e-3 * before + 1e-3 * model.blocks[0].down.weight.pow(3).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    plain, model = model_of("mlp"), model_of("mlp")
    offloaded(model, tmp_path)
    check_same(run(model), run(plain))
    check_same(values(model), values(plain))


def test_a_custom_function_that_keeps_a_parameter(tmp_path: Path) -> None:
    """Kept as an attribute, unknown to autograd's hooks: the block's output brings it before its backward runs."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.weight = weight
            return x @ weight

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad @ ctx.weight.t(), None

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + Scale.apply(x, self.inner.weight)

    torch.manual_seed(0)
    plain = nn.Sequential(*(Custom() for _ in range(6)))
    model = copy.deepcopy(plain)
    offloaded(model, tmp_path, ["*"], prefetch_nbytes=0)
    x, y = batch(0).requires_grad_(), batch(0).requires_grad_()
    model(x).sum().backward()
    plain(y).sum().backward()
    check_same(x.grad, y.grad)


def test_looking_at_a_parameter(tmp_path: Path) -> None:
    """Wherever it is taken from it has its values, and can be written to; past PyTorch's functions it is NaN."""
    model = model_of("mlp")
    expected = values(model)
    owner = offloaded(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.shape == expected[name].shape and parameter.dtype is torch.float32
        if parameter.nbytes >= 1024:
            with torch._C.DisableTorchFunctionSubclass():
                assert parameter.isnan().all()
                with pytest.raises(RuntimeError), torch.no_grad():
                    parameter.add_(1)
        assert torch.equal(parameter, expected[name])
    with torch.no_grad():
        assert torch.equal(model.blocks[0].up.weight, expected["blocks.0.up.weight"])  # type: ignore[union-attr,arg-type]
    with owner.gathered():
        check_same({name: p.detach() for name, p in model.named_parameters()}, expected)
        with torch.no_grad():
            for p in model.parameters():
                p.data.mul_(2)
    check_same(values(model), {name: 2 * value for name, value in expected.items()})
    with pytest.raises(ValueError, match="which match none"), owner.gathered("blok*"):
        pass


def test_a_module_is_copied_as_a_plain_one_and_not_pickled(tmp_path: Path) -> None:
    model = model_of("mlp")
    owner = offloaded(model, tmp_path)
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        torch.save(model, io.BytesIO())
    copied = copy.deepcopy(model)
    check_same(values(copied), values(model))
    with pytest.raises(ValueError, match="which is not"):
        ssdtrain.parameter_offload(copied)
    owner.close()
    check_same(values(copy.deepcopy(model)), values(model))


# -- from the meta device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "shards", "directory", "state_dict"])
def test_from_the_meta_device(form: str, tmp_path: Path) -> None:
    """A model that was never in memory as a whole trains like one that was; frozen and tied parameters stay so."""
    safetensors = pytest.importorskip("safetensors.torch")
    plain = model_of("tied")
    plain.blocks[0].requires_grad_(False)  # type: ignore[index,union-attr]
    state = plain.state_dict()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if form == "shards":
        names = list(dict.fromkeys(name for name in state if name != "head.weight"))
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, chosen in parts.items():
            safetensors.save_file({name: state[name].contiguous() for name in chosen}, folder / file)
        index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        ssdtrain.save_safetensors(plain, folder / "model.safetensors")
    torch.manual_seed(1)
    with torch.device("meta"):
        model = MODELS["tied"]()
    model.blocks[0].requires_grad_(False)  # type: ignore[index,union-attr]
    before = dict(model.named_parameters())
    owner = offloaded(model, tmp_path)
    with pytest.raises(RuntimeError, match="built on the meta device"), owner.gathered():
        pass
    if form == "state_dict":
        ssdtrain.load_safetensors(model, folder)
        for p in model.parameters():
            assert not p.is_meta
        model.load_state_dict(state)
    else:
        ssdtrain.load_safetensors(model, folder / "model.safetensors" if form == "file" else folder)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    check_same(values(model), values(plain))
    check_same(
        train(model, adamw(trainable(model)), 4),
        train(plain, adamw(trainable(plain)), 4),
    )


def test_safetensors_are_read_by_the_library(tmp_path: Path) -> None:
    """What is written has the library's own format: names, dtypes, shapes, metadata; and no partial file is left."""
    safetensors = pytest.importorskip("safetensors")
    model = model_of("gpt")
    model.register_buffer("count", torch.arange(5, dtype=torch.int16))
    model.half_ = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
    expected = values(model)
    offloaded(model, tmp_path)
    ssdtrain.save_safetensors(model, tmp_path / "m.safetensors", {"step": "3"})
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        assert set(file.keys()) == set(expected)
        for name, value in expected.items():
            assert torch.equal(file.get_tensor(name), value) and file.get_tensor(name).dtype is value.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    ssdtrain.save_safetensors(model_of("mlp"), path)
    with pytest.raises(ValueError, match=r"without tokens\..* and with blocks\.0"):
        ssdtrain.load_safetensors(model_of("gpt"), path)
    ssdtrain.load_safetensors(model_of("gpt"), path, strict=False)
    with pytest.raises(ValueError, match=r"without blocks\.4"):
        ssdtrain.load_safetensors(MLP(5), path)
    with pytest.raises(FileNotFoundError, match="got nothing at"):
        ssdtrain.load_safetensors(MLP(), tmp_path / "none")
    other = MLP()
    other.blocks[0].up = nn.Linear(WIDTH, WIDTH)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"of shape \[48, 48\], got \[96, 48\]"):
        ssdtrain.load_safetensors(other, path)


# -- which blocks ------------------------------------------------------------------------------------------------------


def layers_in_sequence() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), inner, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))


def test_layers_of_a_sequential_are_blocks(tmp_path: Path) -> None:
    """Of a model without repeated layers, to the bit; what has no parameters, and an empty container, is none."""
    runs = []
    for is_offloaded in (False, True):
        model = layers_in_sequence()
        if is_offloaded:
            owner = offloaded(model, tmp_path, min_nbytes=0)
            assert [block.name for block in inside.working_set(owner).blocks] == ["0", "2.0", "3", "4"]
        optimizer = adamw(model.parameters())
        losses = []
        for step in range(3):
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        runs.append((losses, values(model)))
    check_same(*[losses for losses, _ in runs])
    check_same(*[final for _, final in runs])
    assert owner.stats.read_nbytes > 0
    shared = nn.Linear(WIDTH, WIDTH)
    twice = nn.ModuleDict({"a": nn.Sequential(shared, nn.Tanh()), "b": nn.Sequential(nn.Identity(), shared)})
    assert [block.name for block in inside.working_set(offloaded(twice, tmp_path)).blocks] == ["a.0"]


# -- bad input ---------------------------------------------------------------------------------------------------------


class Bilingual(nn.Module):
    """Two layers and a function, in no container."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back, self.act = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()


class Special(torch.Tensor):
    """Of another framework."""


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Sequential, got Linear without any: one layer is in memory as a whole"):
        offloaded(nn.Linear(64, 64), tmp_path)
    with pytest.raises(ValueError, match=r"got Bilingual without any: name its blocks: blocks=\['there', 'back'\]"):
        offloaded(Bilingual(), tmp_path)
    with pytest.raises(ValueError, match=r"Expected names of modules such as blocks, .*got 'layers'"):
        offloaded(MLP(), tmp_path, ["layers"])
    with pytest.raises(ValueError, match=r"'blocks.0.up' inside 'blocks.0'"):
        offloaded(MLP(), tmp_path, ["blocks.0", "blocks.0.up"])
    with pytest.raises(TypeError, match=r"Expected a torch.nn.Module"):
        ssdtrain.offload_parameters([MLP()], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        offloaded(MLP(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not offloaded|whose parameters are offloaded"):
        ssdtrain.parameter_offload(MLP())
    special = MLP()
    special.blocks[0].up.weight = nn.Parameter(torch.randn(96, 48).as_subclass(Special))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"Expected plain parameters, got blocks.0.up.weight of type"):
        offloaded(special, tmp_path)
    mixed = MLP()
    mixed.blocks[0].to("meta")
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        offloaded(mixed, tmp_path)
    model = MLP()
    owner = offloaded(model, tmp_path)
    with pytest.raises(ValueError, match="not offloaded yet"):
        offloaded(model, tmp_path)
    owner.close()
    untouched = MLP()
    before = dict(untouched.named_parameters())
    ssdtrain.offload_parameters(untouched, tmp_path, {"enabled": False})
    assert all(not p.isnan().any() and before[name] is p for name, p in untouched.named_parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_was_changed_after_it_was_offloaded(tmp_path: Path) -> None:
    """Re-parametrised: an error at once; cast while it was gathered: before the block computes."""
    cast = MLP()
    owner = offloaded(cast, tmp_path)
    with owner.gathered():
        weight = cast.blocks[0].up.weight  # type: ignore[index,union-attr]
        weight.data = weight.data.double()
        with pytest.raises(RuntimeError, match=r"Expected parameter blocks.0.up.weight as it was offloaded, float32"):
            cast(batch(0))
    parametrised = MLP()
    offloaded(parametrised, tmp_path)
    with pytest.raises(RuntimeError, match=r"OffloadedParameter|to stay the same object"), torch.no_grad():
        nn.utils.parametrizations.weight_norm(parametrised.blocks[1].up)  # type: ignore[union-attr,arg-type]


def test_a_drive_that_is_too_small_says_so_before_anything_moves(small_ext4: Drive) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024)) for _ in range(8)))
    expected = values(model)
    with pytest.raises(OSError, match=r"Expected room for 32.0 MiB of parameters"):
        ssdtrain.offload_parameters(model, small_ext4.directory, blocks=["*"])
    check_same(values(model), expected)
    assert not any(hasattr(p, "_ssdtrain_owner") for p in model.parameters())


def test_tensors_that_share_memory_stay(tmp_path: Path) -> None:
    """Two parameters on one storage are not torn apart; one that does not own its memory gets some of its own."""
    model = MLP()
    shared = torch.randn(2, 96, 48)
    for i in range(2):
        model.blocks[i].up.weight.data = shared[i]  # type: ignore[union-attr]
    model.blocks[2].up.weight.data = torch.frombuffer(bytearray(96 * 48 * 4 * 2), dtype=torch.float32)[: 96 * 48].view(
        96, 48
    )
    plain = copy.deepcopy(model)
    owner = offloaded(model, tmp_path)
    assert owner.stats.stays["shares its memory with another tensor"].count == 2
    check_same(train(model, adamw(model.parameters()), 2), train(plain, adamw(plain.parameters()), 2))


# -- a drive that fails ------------------------------------------------------------------------------------------------


def test_a_lost_read_names_the_parameter(tmp_path: Path) -> None:
    model = model_of("mlp")
    owner = offloaded(model, tmp_path, engine="threads", prefetch_nbytes=0)
    owner.note_checkpoint("/checkpoints/step-40.pt")
    owner.flush()
    file = inside.store(owner).drive.files[0]
    for offset in range(0, file.nbytes, 4096):
        with open(f"/proc/self/fd/{file.fd}", "r+b", buffering=0) as raw:
            byte = os.pread(raw.fileno(), 1, offset + 8)
            os.pwrite(raw.fileno(), bytes([byte[0] ^ 1]), offset + 8)
    with pytest.raises(ssdtrain.StateLostError, match=r"blocks.0.up.weight.*go back .*step-40.pt") as caught:
        model(batch(0))
    assert caught.value.filename == str(tmp_path)


def test_an_interrupted_step_is_not_saved_as_a_whole_one(tmp_path: Path) -> None:
    """Some of the module's parameters are updated and others are not: its state_dict says so until one is loaded."""

    class Failing(torch.optim.SGD):
        num_good = 1 << 30

        def step(self, closure: Any = None) -> Any:
            Failing.num_good -= 1
            if Failing.num_good < 0:
                raise KeyboardInterrupt
            return super().step(closure)

    model = model_of("mlp")
    before = values(model)
    offloaded(model, tmp_path)
    policy = EAGER_STATE | {"chunk_nbytes": 1}
    optimizer = ssdtrain.offload_optimizer(Failing(model.parameters(), lr=0.1), tmp_path, policy)
    Failing.num_good = 2  # after the trial in the constructor
    model(batch(0)).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    with pytest.raises(RuntimeError, match="interrupted: step 1"):
        model.state_dict()
    model.blocks[0].load_state_dict({name[9:]: value for name, value in before.items() if name.startswith("blocks.0.")})
    for save in (model.state_dict, lambda: ssdtrain.save_safetensors(model, tmp_path / "half.safetensors")):
        with pytest.raises(RuntimeError, match="interrupted: step 1"):  # a part of it is not enough
            save()
    model.load_state_dict(before)
    check_same(values(model), before)
