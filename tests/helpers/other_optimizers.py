"""Optimizers of others, as small as they can be and with what matters of each: what they keep, and what for."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam that counts its steps in its groups, as Apex's and TransformerEngine's do."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, (b1, b2) = self.state[p], group["betas"]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = group["lr"] * (1 - b2 ** group["step"]) ** 0.5 / (1 - b1 ** group["step"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)


class TensorCounting(FusedAdam):
    """The count is a tensor that is changed in place, another one an attribute, a third where state is."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group.setdefault("count", torch.zeros(())).add_(1)
            group["lr"] = 1e-2 / float(group["count"]) ** 0.5
        self.num_steps += 1
        self.state["all"] = self.state.get("all", 0) + self.num_steps  # type: ignore[index]


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW: its average is not the parameter but in `eval` mode."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.99), "k": 0, "train_mode": False, "weight_sum": 0.0, "lr_max": -1.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def _swap(self, *, is_training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != is_training:
                weight = 1 - group["betas"][0] if is_training else 1 - 1 / group["betas"][0]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = is_training

    def eval(self) -> None:
        self._swap(is_training=False)

    def train(self) -> None:
        self._swap(is_training=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.param_groups[0]["train_mode"]:
            raise ValueError("Optimizer was not in train mode when step is called")
        for group in self.param_groups:
            (b1, b2), k, lr = group["betas"], group["k"], group["lr"]
            group["lr_max"] = max(lr, group["lr_max"])
            group["weight_sum"] += group["lr_max"] ** 2
            c = group["lr_max"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"], state["exp_avg_sq"] = p.clone(), torch.zeros_like(p)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                update = p.grad / state["exp_avg_sq"].div(1 - b2 ** (k + 1)).sqrt_().add_(1e-8)
                p.lerp_(state["z"], c)
                p.add_(update, alpha=lr * (b1 * (1 - c) - 1))
                state["z"].sub_(update, alpha=lr)
            group["k"] = k + 1


class Prodigy(torch.optim.Optimizer):
    """One step size for all parameters, estimated from all of them."""

    def __init__(self, params: Any, d: float = 1e-2) -> None:
        super().__init__(params, {"lr": 1.0, "d": d, "d0": d, "numerator": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        first = self.param_groups[0]
        d, d0, numerator, total = first["d"], first["d0"], first["numerator"] * 0.99, 0.0
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state |= {"p0": p.clone(), "s": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                numerator += (d / d0) * d * torch.dot(p.grad.flatten(), (state["p0"] - p).flatten()).item()
                state["exp_avg_sq"].mul_(0.99).addcmul_(p.grad, p.grad, value=d * d * 0.01)
                state["s"].mul_(0.99).add_(p.grad, alpha=(d / d0) * d)
                total += state["s"].abs().sum().item()
        d = max(d, numerator / total) if total else d
        for group in self.param_groups:
            group |= {"d": d, "numerator": numerator, "k": group["k"] + 1}
            for p in [p for p in group["params"] if p.grad is not None]:
                p.addcdiv_(p.grad, self.state[p]["exp_avg_sq"].sqrt().add_(d * 1e-8), value=-d * d)


class DAdaptSGD(torch.optim.Optimizer):
    """D-Adaptation: the step size from the norm of the sum of all gradients, kept in a group and in an attribute."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "d": 1e-2})
        self.sums: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        d, squares = self.param_groups[0]["d"], 0.0
        for p in parameters:
            state = self.state[p]
            state["s"] = state.get("s", torch.zeros_like(p)) + d * p.grad
            squares += state["s"].square().sum().item()
        self.sums.append(squares)
        for group in self.param_groups:
            group["d"] = max(d, 0.1 * squares**0.5)
        for p in parameters:
            p.add_(p.grad, alpha=-d)


class Lion(torch.optim.Optimizer):
    """The sign of a momentum."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(average.mul(0.9).add_(p.grad, alpha=0.1).sign_(), alpha=-group["lr"])
                average.lerp_(p.grad, 0.01)


class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner, of which state has a list for each dimension."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "every": 4})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in [p for p in group["params"] if p.grad is not None]:
                state, g = self.state[p], p.grad
                if not state:
                    state["GG"] = [p.new_zeros(n, n) for n in p.shape]
                    state["Q"] = [torch.eye(n, dtype=p.dtype) for n in p.shape]
                    state["exp_avg_sq"] = torch.zeros_like(p)
                for i, product in enumerate(state["GG"]):
                    others = [d for d in range(g.dim()) if d != i]
                    product.lerp_(torch.tensordot(g, g, dims=(others, others)), 0.1)
                if group["step"] % group["every"] == 1:
                    state["Q"] = [torch.linalg.qr(m @ q + 1e-6 * q).Q for m, q in zip(state["GG"], state["Q"])]  # noqa: B905
                for q in state["Q"]:
                    g = torch.tensordot(g, q, dims=([0], [0]))
                state["exp_avg_sq"].mul_(0.99).addcmul_(g, g, value=0.01)
                g = g / state["exp_avg_sq"].sqrt().add_(1e-8)
                for q in state["Q"]:
                    g = torch.tensordot(g, q, dims=([0], [1]))
                p.sub_(g, alpha=group["lr"])


class Adam8bit(torch.optim.Optimizer):
    """Momentum of a byte per element in blocks with a scale each, and one table of values for all parameters."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        self.is_ready = False
        self.tables: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.is_ready:
            self.tables["dynamic"] = torch.linspace(-1, 1, 255)
            self.is_ready = True
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state, table = self.state[p], self.tables["dynamic"]
                blocks = torch.nn.functional.pad(p.grad.flatten(), (0, -p.numel() % 64)).view(-1, 64)
                if not state:
                    state |= {"step": 0, "state1": torch.full(blocks.shape, 127, dtype=torch.uint8), "qmap1": table}
                    state["absmax1"] = torch.ones(len(blocks))
                state["step"] += 1
                m = table[state["state1"].int()] * state["absmax1"][:, None]
                m = m.mul_(0.9).add_(blocks)
                state["absmax1"] = m.abs().amax(1).clamp_(min=1e-12)
                codes = (m / state["absmax1"][:, None]).add_(1).mul_(127).round_()
                state["state1"] = codes.to(torch.uint8)
                p.sub_(m.flatten()[: p.numel()].view_as(p), alpha=group["lr"])


class Sophia(torch.optim.Optimizer):
    """A Hessian estimate that another method than the step updates, from gradients of another loss."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def update_hessian(self) -> None:
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                hessian = self.state[p].setdefault("hessian", torch.zeros_like(p))
                hessian.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)

    @torch.no_grad()
    def rescale(self, to: float) -> float:
        """For all parameters by the norm of all of them."""
        found = [s["exp_avg"] for s in self.state.values() if "exp_avg" in s]
        norm = torch.stack([a.norm() for a in found]).norm()
        for average in found:
            average.mul_(to / norm)
        return norm.item()

    @torch.no_grad()
    def blend(self, values: list[torch.Tensor]) -> None:
        for p, value in zip(self.param_groups[0]["params"], values):  # noqa: B905
            self.state[p]["exp_avg"].lerp_(value, 0.5)

    def get_lr(self) -> float:
        return float(self.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                average = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                scale = state["hessian"].clamp(min=1e-4) if "hessian" in state else 1.0
                p.sub_((average / scale).clamp_(-1, 1), alpha=group["lr"])


class SAM(torch.optim.Optimizer):
    """Climbs, and steps with the gradient from there; another optimizer does that."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
                p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        raise ValueError("SAM needs two steps")


class Global(FusedAdam):
    """Clips by the norm of all gradients inside its step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norm = torch.stack([g.norm() for g in gradients]).norm()
            for g in gradients:
                g.mul_(0.1 / norm)
        super().step()
