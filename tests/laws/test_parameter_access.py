"""An offloaded parameter that somebody uses has its values: read, written, cast, averaged, copied; never NaN.

Every habit runs on a plain model and on an offloaded one; both are equal to the bit afterwards and train on equally.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from state_tools import EAGER_STATE, MLP, adamw, batch, check_same, model_of, train, values
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ssdtrain


def offloaded(model: nn.Module, folder: Path, **policy: Any) -> ssdtrain.ParameterOffload:
    ssdtrain.offload_parameters(model, folder, EAGER_STATE | policy)
    return ssdtrain.parameter_offload(model)


def full_nbytes(model: nn.Module) -> int:
    """Memory that parameters of blocks have now."""
    return sum(r.nbytes for r in inside.working_set(ssdtrain.parameter_offload(model)) if r.storage is not None)


def block_nbytes(model: nn.Module) -> int:
    working_set = inside.working_set(ssdtrain.parameter_offload(model))
    return max(sum(r.nbytes for r in block.records) for block in working_set.blocks)


def check_trains_on(model: nn.Module, plain: nn.Module) -> None:
    dtype = next(plain.parameters()).dtype

    def losses(module: nn.Module) -> list[torch.Tensor]:
        optimizer, found = adamw(module.parameters()), []
        for step in range(3):
            loss = module(batch(step).to(dtype))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return found

    check_same(losses(model), losses(plain))
    check_same(values(model), values(plain))


# -- changed as a whole ------------------------------------------------------------------------------------------------


def halve(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.5


def through_a_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 2, model.parameters())


def load_its_own(model: nn.Module) -> None:
    model.load_state_dict(dict(model.named_parameters()))


def load_another(model: nn.Module) -> None:
    model.load_state_dict({name: p * 3 for name, p in model.named_parameters()})


def zero(model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.zeros_(p)


def initialise(model: nn.Module) -> None:
    torch.manual_seed(7)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)


def fill(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.fill_(0.125)


def clip(model: nn.Module) -> None:
    """WGAN's."""
    for p in model.parameters():
        p.data.clamp_(-0.01, 0.01)


def clip_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.01, 0.01).add_(1e-3)


def polyak(model: nn.Module) -> None:
    for p, q in zip(model.parameters(), model_of("mlp").parameters(), strict=True):
        p.data.mul_(0.9)
        p.data.add_(0.1 * q.data)


def foreach(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)


def through_numpy(model: nn.Module) -> None:
    """Past every version counter, through an array that outlives its tensor."""
    for array in [p.detach().numpy() for p in model.parameters()]:
        array *= 0.5


def through_a_list(model: nn.Module) -> None:
    """Written to long after they were taken out, other parameters and a checkpoint between."""
    everything = [p.data for p in model.parameters()]
    model.state_dict()
    if hasattr(model, "_ssdtrain_parameters"):
        ssdtrain.parameter_offload(model).flush()
    for data in everything:
        data.add_(0.5)


def swap(model: nn.Module) -> None:
    """What `torch.__future__.set_swap_module_params_on_conversion` does."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda model: model.bfloat16().half().float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": nn.Module.double,
    "device": lambda model: model.to("cpu"),
    "apply": lambda model: model._apply(lambda t: t * 2),
    "type": lambda model: model.type(torch.float64),
    **{
        change.__name__: change
        for change in (
            *(halve, through_a_vector, load_its_own, load_another, zero, initialise, fill, clip, clip_in_place),
            *(polyak, foreach, through_numpy, through_a_list, swap),
        )
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """Casts, assignments, loads and writes reach the bytes on the drive, before and after training."""
    plain, model = model_of("mlp"), model_of("mlp")
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    for is_trained in (False, True):
        for module in (plain, model):
            CHANGES[name](module)
            if is_trained:
                module.float()
        check_same(values(model), values(plain))
        owner.flush()
        assert full_nbytes(model) == 0
        check_trains_on(model, plain)
        if name in ("bfloat16", "double", "type"):
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float64
            assert is_trained or {p.dtype for p in model.parameters()} == {dtype}
    owner.close()
    check_same(values(model), values(plain))
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


# -- read --------------------------------------------------------------------------------------------------------------


def average(model: nn.Module, step: Callable[[], object]) -> Any:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        step()
        averaged.update_parameters(model)
    return values(averaged)


def average_by_hand(model: nn.Module, step: Callable[[], object]) -> Any:
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        step()
        for name, p in model.named_parameters():
            shadow[name].mul_(0.9).add_(p.data, alpha=0.1)
    return shadow


def copies(model: nn.Module, step: Callable[[], object]) -> Any:
    """A frozen teacher, which computes, and trains, apart from its student."""
    teacher = copy.deepcopy(model)
    assert {type(p) for p in teacher.parameters()} == {nn.Parameter}
    step()
    train(teacher, adamw(teacher.parameters()), 2)
    block = copy.deepcopy(model.blocks[1])  # type: ignore[index]
    return [values(teacher), values(block), copy.deepcopy(next(model.parameters())).detach()]


def elastic_weights(model: nn.Module, step: Callable[[], object]) -> Any:
    """EWC: Fisher information, a copy of the weights, and a penalty of the distance."""
    old = {name: p.clone().detach() for name, p in model.named_parameters()}
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model(batch(0)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        fisher[name] += p.grad.detach() ** 2
    step()
    for _ in range(2):
        loss = model(batch(1))
        for name, p in model.named_parameters():
            loss = loss + (fisher[name] * (p - old[name]) ** 2).sum()
        loss.backward()
        step()
    return fisher


def penalty(model: nn.Module, step: Callable[[], object]) -> Any:
    """L2, its graph apart from that of the model, before, beside and after the forward."""
    for kind in range(3):
        before = sum((p.pow(2).sum() for p in model.parameters()), torch.zeros(())) if kind == 0 else 0.0
        loss = model(batch(kind))
        if kind:
            before = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        (loss + 1e-2 * before).backward()
        if kind == 2:
            sum((torch.linalg.vector_norm(p.t()) for p in model.parameters()), torch.zeros(())).backward()
        step()
    return None


def gradients(model: nn.Module, step: Callable[[], object]) -> Any:
    """`torch.autograd.grad` with every parameter as an input, and a gradient penalty."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(batch(0)), parameters, create_graph=True)
    again = torch.autograd.grad(sum(((g**2).sum() for g in grads), torch.zeros(())), parameters)
    torch.autograd.grad(model(batch(0)), inputs=parameters[0])
    return [*grads, *again]


def numbers(model: nn.Module, step: Callable[[], object]) -> Any:
    step()
    parameters = list(model.parameters())
    return [
        parameters_to_vector(parameters),
        [p.norm() for p in parameters],
        [p.abs().max().item() for p in parameters],
        torch._foreach_norm(parameters),
        nn.utils.get_total_norm(parameters),
        [repr(p) for p in parameters[:2]],
        [p.tolist() for p in parameters[:2]],
        [(p.stride(), p.is_contiguous(), p.dtype, p.shape) for p in parameters],
        torch.stack([p.mean() for p in parameters]),
    ]


def saved(model: nn.Module, step: Callable[[], object]) -> Any:
    """The parameters themselves, as people save adapters."""
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    found = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert {type(p) for p in found.values()} == {nn.Parameter}
    return {name: p.detach() for name, p in found.items()}


READS = {
    read.__name__: read
    for read in (average, average_by_hand, copies, elastic_weights, penalty, gradients, numbers, saved)
}


@pytest.mark.parametrize("optimizer", ["plain", "offloaded"])
@pytest.mark.parametrize("name", READS)
def test_what_reads_parameters_gets_values(name: str, optimizer: str, tmp_path: Path) -> None:
    found, models = [], [model_of("mlp"), model_of("mlp")]
    owner = offloaded(models[1], tmp_path, prefetch_nbytes=0)
    for model in models:
        steps: torch.optim.Optimizer = adamw(model.parameters())
        if optimizer == "offloaded" and model is models[1]:
            steps = ssdtrain.offload_optimizer(steps, owner)

        def step(model: nn.Module = model, steps: torch.optim.Optimizer = steps) -> None:
            model(batch(3)).backward()
            steps.step()
            steps.zero_grad()

        found.append(READS[name](model, step))
    check_same(found[1], found[0])
    check_same(values(models[1]), values(models[0]))
    del found
    owner.flush()
    assert full_nbytes(models[1]) == 0


def test_activations_on_the_drive_beside_a_penalty(tmp_path: Path) -> None:
    """Its graph is saved through the activations' hooks, which leave weights alone."""
    plain, model = model_of("mlp"), model_of("mlp")
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    with ssdtrain.offload_activations(tmp_path, {"min_nbytes": 0, "mode": "all"}, model):
        penalty(model, lambda: None)
    penalty(plain, lambda: None)
    check_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    owner.flush()
    assert full_nbytes(model) == 0


def test_reading_everything_takes_a_few_blocks(tmp_path: Path) -> None:
    """Casts, averages by hand and penalties go through a model that would not fit: never more than two blocks of it."""
    model = MLP(12)
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    limit, seen = 2 * block_nbytes(model), list[int]()

    def note(parameters: Iterable[torch.Tensor]) -> None:
        for p in parameters:
            p.detach().mean()
            seen.append(full_nbytes(model))
            p.data = p.data.double()
            seen.append(full_nbytes(model))
            p.data = p.data.float()
            seen.append(full_nbytes(model))

    note(model.parameters())
    for p in model.parameters():
        p.pow(2).sum().backward()
        seen.append(full_nbytes(model))
    loss = sum((p.pow(2).sum() for p in model.parameters()), torch.zeros(()))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(full_nbytes(model)))
    loss.backward()
    # A block of visitors in float64 at most, and the one that is being read; or two blocks in backward.
    assert max(seen) <= 2 * limit, (max(seen), limit)
    owner.flush()
    assert full_nbytes(model) == 0


def test_reading_does_not_write(tmp_path: Path) -> None:
    """Norms, copies and state dicts wear out no drive."""
    model = model_of("mlp")
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    owner.flush()
    written = owner.stats.written_nbytes
    for p in model.parameters():
        p.norm(), p.clone(), (p * 2).sum()
    model.state_dict()
    copy.deepcopy(model)
    model.requires_grad_(False).requires_grad_(True)
    owner.flush()
    assert owner.stats.written_nbytes == written


def test_what_needs_no_values_reads_none(tmp_path: Path) -> None:
    """Shapes, gradients and hooks of every parameter: what optimizers and wrappers look at."""
    model = model_of("mlp")
    owner = offloaded(model, tmp_path, prefetch_nbytes=0)
    owner.flush()
    reads = owner.stats.read_nbytes
    for p in model.parameters():
        assert p.requires_grad and p.is_leaf and p.grad is None and p.numel() and p.dim() and p.size(0) and len(p)
        p.register_hook(lambda g: g).remove()
        p.requires_grad_(True)
        p.grad = None
    adamw(model.parameters()).zero_grad()
    assert len(set(model.parameters())) == 16
    assert owner.stats.read_nbytes == reads


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_placeholder_is_never_taken_for_a_value(tmp_path: Path) -> None:
    """Past PyTorch's functions there is NaN: what writes to it raises, what was computed from it is no new value."""
    model = model_of("mlp")
    expected = values(model)
    owner = offloaded(model, tmp_path)
    owner.flush()
    p = dict(model.named_parameters())["blocks.1.up.weight"]
    with torch._C.DisableTorchFunctionSubclass():
        assert p.isnan().all()
        with pytest.raises(RuntimeError):
            p.data.fill_(1)
        with pytest.raises(RuntimeError), torch.no_grad():
            p.mul_(2)
    check_same(values(model), expected)
    with torch._C.DisableTorchFunctionSubclass():
        p.data = p.data * 0.5
    for save in (model.state_dict, owner.flush, lambda: model(batch(0))):
        with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight, got NaN computed while .*gathered\(\)"):
            save()


def test_bytes_written_to_a_placeholder_are_seen(tmp_path: Path) -> None:
    """By code that has its address."""
    import ctypes

    model = model_of("mlp")
    owner = offloaded(model, tmp_path)
    owner.flush()
    r = next(r for r in inside.working_set(owner) if r.name == "blocks.2.up.weight")
    ctypes.memset(r._placeholder_address, 0, 4)
    for save in (model.state_dict, owner.flush, lambda: model(batch(0))):
        with pytest.raises(RuntimeError, match=r"blocks\.2\.up\.weight while .*placeholder: .*gathered\(\)"):
            save()


def test_others_in_the_place_of_a_parameter_are_refused_at_once(tmp_path: Path) -> None:
    """Another shape, another object, none: by name, and nothing has changed."""
    plain, model = model_of("mlp"), model_of("mlp")
    offloaded(model, tmp_path)
    linear: Any = model.blocks[1].up  # type: ignore[index,union-attr]
    with pytest.raises(RuntimeError, match=r"shape \[96, 48\] .*blocks\.1\.up\.weight.*of shape \[3\]"):
        linear.weight.data = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight to stay the same object"):
        linear.weight = nn.Parameter(torch.zeros(96, 48))
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight to stay the same object"):
        del linear.weight
    with pytest.raises(RuntimeError, match=r"to stay the same object"):
        model.to("meta")
    check_same(values(model), values(plain))
    check_trains_on(model, plain)


def test_export_says_what_to_do(tmp_path: Path) -> None:
    """An offloaded module is not exported; its copy is."""
    plain, model = model_of("mlp"), model_of("mlp")
    offloaded(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"torch\.export.*offloaded: export copy\.deepcopy\(model\)"):
        torch.export.export(model, (batch(0),))
    exported = torch.export.export(copy.deepcopy(model), (batch(0),))
    assert torch.equal(exported.module()(batch(0)), plain(batch(0)))
    check_trains_on(model, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo's own
def test_compiled_modules(tmp_path: Path) -> None:
    """As a whole, and block by block."""
    for by_block in (False, True):
        plain, model = model_of("mlp"), model_of("mlp")
        offloaded(model, tmp_path)
        compiled: Any = model
        if by_block:
            for block in model.blocks:  # type: ignore[union-attr]
                block.compile(backend="eager")  # type: ignore[operator]
        else:
            compiled = torch.compile(model, backend="eager")
        for module, run in ((plain, plain), (model, compiled)):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            for step in range(2):
                run(batch(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
        check_same(values(model), values(plain))
        torch.compiler.reset()


def test_memory_that_a_hook_of_a_block_keeps_is_the_parameters(tmp_path: Path) -> None:
    """What is written there after the block has run was lost without a word."""
    model = model_of("mlp")
    owner = offloaded(model, tmp_path)
    kept: list[torch.Tensor] = []
    module = model.blocks[1].up  # type: ignore[union-attr, index]
    handle = module.register_forward_hook(lambda m, *_: kept.append(m.weight.data))
    with torch.no_grad():
        model(batch(0))
        kept[0].fill_(7.0)
        kept.clear()
        handle.remove()
        model(batch(0))
    assert (dict(model.named_parameters())["blocks.1.up.weight"] == 7.0).all()
    owner.close()
