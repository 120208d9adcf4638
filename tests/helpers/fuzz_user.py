"""What users do between building a module and the end of training: with ssdtrain, and the same without.

`Plain` does each thing as the books say; `User` trains an offloaded module with an offloaded optimizer, and does the
same, but where the documentation names another way (`gathered()`, `accumulate()`, `clip_grad_norm_`), sometimes that.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fuzz_models import OPTIMIZERS, OopsError, Written, batch_of
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import ssdtrain

if TYPE_CHECKING:
    from fuzz_state import Program


class Plain:
    """Trains without ssdtrain."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program, self.model = program, model
        self.seen: list[Any] = []  # losses and whatever else was looked at
        self.num_steps = 0
        self.saved: list[Any] = []
        self.averages: dict[str, torch.Tensor] = {}
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda epoch: 0.9**epoch)

    def make_optimizer(self) -> torch.optim.Optimizer:
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        num, half = self.program.num_groups, len(chosen) // 2
        groups = (
            [{"params": chosen}] if num == 1 else [{"params": chosen[:half]}, {"params": chosen[half:], "lr": 2e-3}]
        )
        return OPTIMIZERS[self.program.optimizer](groups)

    # -- where the two differ --------------------------------------------------------------------------------------

    is_offloaded = False
    acts_in_backward = False
    is_incomplete = False  # a step failed in the middle

    def activations(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def accumulate(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip(self, norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.trained(), norm)

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    # -- what there is ---------------------------------------------------------------------------------------------

    def everything(self) -> dict[str, Any]:
        """Copies of all values."""
        values = _copied(dict(self.model.state_dict()))
        return {
            "model": values,
            "parameters": {name: values[name] for name, _ in self.model.named_parameters()},
            "optimizer": _copied(self.optimizer.state_dict()),
            "seen": list(self.seen),
        }

    def trained(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def do(self, name: str, number: int) -> None:
        HABITS[name](self, random.Random(number))


class User(Plain):
    """Trains with ssdtrain."""

    is_offloaded = True

    def __init__(self, program: Program, model: nn.Module, folder: str) -> None:
        self.folder = folder
        self.offload: Any = None
        self.context: Any = None
        self.program = program
        self.begin(model)
        super().__init__(program, model)
        policy = program.state or {}
        self.acts_in_backward = bool(policy.get("step_in_backward"))

    def begin(self, model: nn.Module) -> None:
        program = self.program
        if program.parameters is not None:
            prefix = "module." if isinstance(model, nn.parallel.DistributedDataParallel) else ""
            ssdtrain.offload_parameters(model, self.folder, program.parameters, [f"{prefix}body.*"])
            self.offload = ssdtrain.parameter_offload(model)
        if program.has_activations:
            self.context = ssdtrain.offload_activations(self.folder, {"min_nbytes": 0, "mode": "all"})

    def make_optimizer(self) -> torch.optim.Optimizer:
        self.inner = super().make_optimizer()
        return self.inner if self.program.state is None else self.offloaded(self.inner)

    def offloaded(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        is_shared = self.program.is_shared and self.offload is not None
        return ssdtrain.offload_optimizer(optimizer, self.offload if is_shared else self.folder, self.program.state)

    def activations(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.context is None else self.context

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.offload is None else self.offload.gathered()

    def accumulate(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.program.state is None else self.optimizer.accumulate()

    def clip(self, norm: float) -> torch.Tensor:
        return super().clip(norm) if self.program.state is None else self.optimizer.clip_grad_norm_(norm)

    def close(self) -> None:
        if self.program.state is not None:
            self.optimizer.close()
            self.optimizer = self.inner
        if self.offload is not None:
            self.offload.close()
        if self.context is not None:
            self.context.close()

    def abandon(self) -> None:
        for each in (self.context, self.optimizer if self.program.state is not None else None, self.offload):
            with contextlib.suppress(Exception):
                if each is not None:
                    each.close()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


# -- steps -------------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _loss(user: Plain, number: int) -> torch.Tensor:
    torch.manual_seed(number)
    with user.activations():
        loss: torch.Tensor = user.model(batch_of(number, _rank()))
    return loss


def step(user: Plain, draw: random.Random) -> None:
    """One step, with one or several backward passes, clipped or not."""
    num_passes, clipping = draw.choice([1, 1, 1, 2, 3]), draw.choice(["no", "no", "theirs", "value", "ours"])
    keeps_gradients = draw.random() < 0.15
    user.num_steps += 1
    for i in range(num_passes):
        loss = _loss(user, 10 * user.num_steps + i)
        with user.accumulate() if i + 1 < num_passes else contextlib.nullcontext():
            loss.backward()
        user.seen.append(loss.detach().clone())
    if clipping == "theirs":
        user.seen.append(torch.nn.utils.clip_grad_norm_(user.trained(), 0.05).clone())
    elif clipping == "value":
        torch.nn.utils.clip_grad_value_(user.trained(), 0.01)
    elif clipping == "ours":
        user.seen.append(user.clip(0.05).clone())
    user.optimizer.step()
    user.optimizer.zero_grad(set_to_none=not keeps_gradients)


def step_with_closure(user: Plain, draw: random.Random) -> None:
    user.num_steps += 1

    def closure() -> torch.Tensor:
        user.optimizer.zero_grad()
        loss = _loss(user, 10 * user.num_steps)
        loss.backward()
        return loss

    user.seen.append(user.optimizer.step(closure).detach().clone())
    user.optimizer.zero_grad()


def step_with_penalty(user: Plain, draw: random.Random) -> None:
    """An L2 penalty through `parameters()`."""
    user.num_steps += 1
    loss = _loss(user, 10 * user.num_steps)
    loss = loss + 1e-3 * sum(p.float().square().sum() for p in user.model.parameters() if p.requires_grad)
    loss.backward()
    user.seen.append(loss.detach().clone())
    user.optimizer.step()
    user.optimizer.zero_grad()


def skipped_step(user: Plain, draw: random.Random) -> None:
    """A loss that is not finite: the gradients are looked at, and the step is left out."""
    user.num_steps += 1
    (_loss(user, 10 * user.num_steps) * float("inf")).backward()
    is_finite = all(bool(p.grad.isfinite().all()) for p in user.trained() if p.grad is not None)
    user.seen.append(is_finite)
    if is_finite:
        user.optimizer.step()
    user.optimizer.zero_grad()


def evaluation(user: Plain, draw: random.Random) -> None:
    was = user.model.training
    user.model.eval()
    with torch.no_grad():
        user.seen.append(_loss(user, 7).clone())
    user.model.train(was)


def scheduler(user: Plain, draw: random.Random) -> None:
    user.scheduler.step()


# -- what fails in the middle ------------------------------------------------------------------------------------------


def _raise(*_: Any) -> Any:
    raise OopsError


def forward_that_raises(user: Plain, draw: random.Random) -> None:
    blocks = list(_body(user.model))
    handle = draw.choice(blocks).register_forward_hook(_raise)
    try:
        _loss(user, 3)
    except OopsError:
        user.seen.append("raised")
    handle.remove()
    user.optimizer.zero_grad()


def backward_that_raises(user: Plain, draw: random.Random) -> None:
    block = draw.choice(list(_body(user.model)))
    handle = block.register_forward_hook(lambda *a: a[2].register_hook(_raise) and None)
    loss = _loss(user, 3)
    handle.remove()
    try:
        loss.backward()
    except OopsError:
        user.seen.append("raised")
    user.is_incomplete |= user.acts_in_backward  # raised or not, no step follows
    user.optimizer.zero_grad()


def step_that_raises(user: Plain, draw: random.Random) -> None:
    """Before it begins."""
    handle = user.optimizer.register_step_pre_hook(_raise)
    _loss(user, 3)
    try:
        user.optimizer.step()
    except OopsError:
        user.seen.append("raised")
    handle.remove()
    user.optimizer.zero_grad()


def update_that_raises(user: Plain, draw: random.Random) -> None:
    """In the middle of a step: some parameters are updated and others not, and nobody can tell which."""
    if (user.program.state or {}).get("step_in_backward"):  # whose updates are over before
        return
    _loss(user, 3).backward()
    Written.num_before_failure = draw.choice([0, 1, 3])
    try:
        user.optimizer.step()
    except OopsError:
        user.seen.append("raised")
        user.is_incomplete = True
    finally:
        Written.num_before_failure = -1
    user.optimizer.zero_grad()


def _body(model: nn.Module) -> Any:
    return getattr(model, "module", model).body


# -- changes of parameters ---------------------------------------------------------------------------------------------


def data_edit(user: Plain, draw: random.Random) -> None:
    for p in user.model.parameters():
        p.data.mul_(0.9)


def no_grad_edit(user: Plain, draw: random.Random) -> None:
    with torch.no_grad():
        for p in user.model.parameters():
            p.mul_(0.9)


def gathered_edit(user: Plain, draw: random.Random) -> None:
    with user.gathered(), torch.no_grad():
        for p in user.model.parameters():
            p.mul_(0.9)


def data_assignment(user: Plain, draw: random.Random) -> None:
    for p in user.model.parameters():
        p.data = p.data * 0.5


def initialisation(user: Plain, draw: random.Random) -> None:
    chosen = draw.choice([nn.init.zeros_, nn.init.ones_, lambda p: nn.init.normal_(p, std=0.02)])
    torch.manual_seed(5)
    for p in list(user.model.parameters())[-4:]:
        chosen(p)


def vectors(user: Plain, draw: random.Random) -> None:
    parameters = list(user.model.parameters())
    if len({p.dtype for p in parameters}) == 1:
        with torch.no_grad():
            vector_to_parameters(parameters_to_vector(parameters) * 0.5, parameters)


def weight_clipping(user: Plain, draw: random.Random) -> None:
    for p in user.model.parameters():
        p.data.clamp_(-0.2, 0.2)


def cast(user: Plain, draw: random.Random) -> None:
    dtype = draw.choice([torch.float64, torch.bfloat16, torch.float16, torch.float32])
    user.model.to(dtype)


def freeze(user: Plain, draw: random.Random) -> None:
    block = draw.choice(list(_body(user.model)))
    for p in block.parameters():
        p.requires_grad_(not p.requires_grad)


def new_group(user: Plain, draw: random.Random) -> None:
    frozen = [p for p in user.model.parameters() if all(p is not q for q in user.trained())]
    if frozen:
        for p in frozen:
            p.requires_grad_(True)
        user.optimizer.add_param_group({"params": frozen})


def other_settings(user: Plain, draw: random.Random) -> None:
    for group in user.optimizer.param_groups:
        group["lr"] = draw.choice([1e-3, 5e-3])


# -- reading -----------------------------------------------------------------------------------------------------------


def average(user: Plain, draw: random.Random) -> None:
    """By hand, through `named_parameters()`."""
    for name, p in user.model.named_parameters():
        old = user.averages.get(name)
        value = p.detach().float()
        user.averages[name] = value.clone() if old is None else old.lerp(value, 0.5)
        user.seen.append(user.averages[name])


def averaged_model(user: Plain, draw: random.Random) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(getattr(user.model, "module", user.model))
    averaged.update_parameters(getattr(user.model, "module", user.model))
    user.seen.append(_copied(dict(averaged.state_dict())))


def read_norms(user: Plain, draw: random.Random) -> None:
    user.seen.append(torch.stack([p.detach().float().norm() for p in user.model.parameters()]))


def read_gathered(user: Plain, draw: random.Random) -> None:
    with user.gathered():
        user.seen.append([p.detach().clone() for p in user.model.parameters()])


def read_state(user: Plain, draw: random.Random) -> None:
    for p in user.trained():
        user.seen.append(_copied(dict(user.optimizer.state[p])) if p in user.optimizer.state else None)


def parameters_saved(user: Plain, draw: random.Random) -> None:
    file = io.BytesIO()
    torch.save(dict(user.model.named_parameters()), file)
    file.seek(0)
    user.seen.append({name: p.detach() for name, p in torch.load(file, weights_only=False).items()})


def deep_copy(user: Plain, draw: random.Random) -> None:
    other = copy.deepcopy(user.model)
    user.seen.append(_copied(dict(other.state_dict())))


# -- changes of state --------------------------------------------------------------------------------------------------


def state_edit(user: Plain, draw: random.Random) -> None:
    """In place, as plasticity resets do."""
    for p in user.trained()[:3]:
        for value in user.optimizer.state[p].values() if p in user.optimizer.state else ():
            if isinstance(value, torch.Tensor) and value.dim():
                value.zero_()


def state_assignment(user: Plain, draw: random.Random) -> None:
    """As ReLoRA does."""
    for p in user.trained()[:3]:
        if p in user.optimizer.state:
            state = user.optimizer.state[p]
            for name, value in list(state.items()):
                if isinstance(value, torch.Tensor) and value.dim():
                    state[name] = torch.zeros_like(value)


def state_removal(user: Plain, draw: random.Random) -> None:
    kind = draw.choice(["clear", "del", "all"])
    if kind == "all":
        user.optimizer.state.clear()
    for p in user.trained()[:2]:
        if p in user.optimizer.state:
            if kind == "clear":
                user.optimizer.state[p].clear()
            else:
                del user.optimizer.state[p]


def other_method(user: Plain, draw: random.Random) -> None:
    """Methods beside `step` that use the state."""
    swap = getattr(user.optimizer, "swap", None)
    if swap is not None:
        swap()
        user.seen.append(None)
        swap()
        if draw.random() < 0.5:
            swap()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def state_dicts(user: Plain, draw: random.Random) -> None:
    """Saved, trained on, loaded again; through a file or not."""
    saved: Any = {"model": user.model.state_dict(), "optimizer": user.optimizer.state_dict()}
    if draw.random() < 0.5:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    else:
        saved = {"model": dict(_copied(saved["model"])), "optimizer": copy.deepcopy(saved["optimizer"])}
    step(user, draw)
    user.model.load_state_dict(saved["model"])
    user.optimizer.load_state_dict(saved["optimizer"])


def loaded_parameters(user: Plain, draw: random.Random) -> None:
    """Onto themselves, and not through `state_dict`."""
    user.model.load_state_dict(dict(user.model.named_parameters()), strict=False)


def safetensors(user: Plain, draw: random.Random) -> None:
    folder = getattr(user, "folder", None)
    path = (
        Path(folder or "/tmp") / f"{'ours' if folder else 'plain'}-{_rank()}-{user.program.seed}-{id(user)}.safetensors"
    )
    ssdtrain.save_safetensors(user.model, path)
    step(user, draw)
    ssdtrain.load_safetensors(user.model, path)
    path.unlink()


def offload_anew(user: Plain, draw: random.Random) -> None:
    """The offload ends, and another begins."""
    if isinstance(user, User):
        user.close()
        user.begin(user.model)
        if user.program.state is not None:
            user.optimizer = user.offloaded(user.inner)
        user.scheduler.optimizer = user.optimizer


def flush(user: Plain, draw: random.Random) -> None:
    if isinstance(user, User):
        for each in (user.offload, user.optimizer if user.program.state is not None else None):
            if each is not None:
                each.flush()


HABITS: dict[str, Callable[[Plain, random.Random], None]] = {
    "step": step,
    "step with closure": step_with_closure,
    "step with penalty": step_with_penalty,
    "skipped step": skipped_step,
    "evaluation": evaluation,
    "scheduler": scheduler,
    "forward that raises": forward_that_raises,
    "backward that raises": backward_that_raises,
    "step that raises": step_that_raises,
    "update that raises": update_that_raises,
    "data edit": data_edit,
    "no_grad edit": no_grad_edit,
    "gathered edit": gathered_edit,
    "data assignment": data_assignment,
    "initialisation": initialisation,
    "vectors": vectors,
    "weight clipping": weight_clipping,
    "cast": cast,
    "freeze": freeze,
    "new group": new_group,
    "other settings": other_settings,
    "average": average,
    "averaged model": averaged_model,
    "read norms": read_norms,
    "read gathered": read_gathered,
    "read state": read_state,
    "parameters saved": parameters_saved,
    "deep copy": deep_copy,
    "state edit": state_edit,
    "state assignment": state_assignment,
    "state removal": state_removal,
    "other method": other_method,
    "state dicts": state_dicts,
    "loaded parameters": loaded_parameters,
    "safetensors": safetensors,
    "flush": flush,
    "offload anew": offload_anew,
}
"""What a program is made of, by name."""
