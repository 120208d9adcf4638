"""The table's rows of eager training: modes, operators, and what users do around a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from composition import Group, Way
from torch import nn
from torch.nn import functional as F

WIDTH, ROWS = 32, 64
EAGER = Group("Eager training")

Model = nn.Module
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def mlp(num_blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(num_blocks)))


def batch(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), generator=torch.Generator().manual_seed(step))


def mean(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def grads(model: Model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def train(
    way: Way, model: Model, loss_of: Loss = mean, *shape: int, backward: Any = torch.Tensor.backward
) -> list[Any]:
    """Losses, gradients and parameters of two steps of SGD."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.01), []
    with way.activations():
        for step in range(2):
            loss = loss_of(model, batch(step, *shape))
            way.send()
            backward(loss)
            found += [loss.detach().clone(), *grads(model)]
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *[p.detach() for p in model.parameters()]]


# -- modes -------------------------------------------------------------------------------------------------------------


@EAGER.row("training")
def training(way: Way) -> Any:
    return train(way, mlp())


@EAGER.row("evaluation in no_grad and inference_mode between steps")
def evaluation(way: Way) -> Any:
    seen = []

    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            seen.append(model(x))
        with torch.inference_mode():
            seen.append(model(x).clone())
        return mean(model, x)

    return train(way, mlp(), loss_of), [x.clone() for x in seen]


@EAGER.row("no_grad inside of forward")
def no_grad(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = model[0](x)
        return mean(model[1:], x)

    return train(way, mlp(), loss_of)


@EAGER.row("gradient accumulation, forwards before backwards")
def accumulation(way: Way) -> Any:
    return train(way, mlp(), lambda model, x: sum(mean(model, x + i) for i in range(3)))


@EAGER.row("retain_graph, backward twice")
def retain_graph(way: Way) -> Any:
    def backward(loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    return train(way, mlp(), backward=backward)


@EAGER.row("double backward: gradient penalty")
def penalty(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        loss = mean(model, x.requires_grad_())
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + (grad.norm(dim=-1) - 1).square().mean()

    return train(way, mlp(), loss_of)


@EAGER.row("inner steps with create_graph (MAML)")
def inner_steps(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        fast = dict(model.named_parameters())
        for i in range(2):
            loss = torch.func.functional_call(model, fast, (x + i,)).square().mean()
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - 0.1 * slope for (name, p), slope in zip(fast.items(), slopes, strict=True)}
        return torch.func.functional_call(model, fast, (x,)).square().mean()

    return train(way, mlp(2), loss_of)


@EAGER.row("a Hessian-vector product")
def hessian(way: Way) -> Any:
    model = mlp()
    with way.activations():
        slopes = torch.autograd.grad(mean(model, batch(0)), list(model.parameters()), create_graph=True)
        way.send()
        torch.autograd.backward(slopes, [torch.ones_like(slope) for slope in slopes])
    return grads(model)


@EAGER.row("a forward inside of backward, in a hook")
def forward_in_backward(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = model[0](x)

        def again(grad: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                side = mean(model[1], y)
                way.send()
                return grad + torch.autograd.grad(side, y)[0]

        hidden.register_hook(again)
        return mean(model[1:], hidden)

    return train(way, mlp(), loss_of)


@EAGER.row("cached representations, their gradients given later (GradCache)")
def grad_cache(way: Way) -> Any:
    model = mlp()
    with way.activations():
        with torch.no_grad():
            kept = [model(batch(i)) for i in range(3)]
        together = torch.cat(kept).requires_grad_()
        torch.logsumexp(together @ together.T, -1).mean().backward()
        assert together.grad is not None
        for i, grad in enumerate(together.grad.split(ROWS)):
            out = model(batch(i))
            way.send()
            out.backward(grad)
    return grads(model)


@EAGER.row("autograd.grad of some inputs")
def some_inputs(way: Way) -> Any:
    model = mlp()
    with way.activations():
        loss = mean(model, batch(0))
        way.send()
        return torch.autograd.grad(loss, [model[0].up.weight, model[2].down.bias])


@EAGER.row("a graph that is dropped without backward")
def dropped(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        mean(model, x + 1)
        return mean(model, x)

    return train(way, mlp(), loss_of)


@EAGER.row("only a part of the graph walked")
def part(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = model[0](x)
        model[1](hidden).sum()
        return mean(model[2], hidden)

    return train(way, mlp(), loss_of)


@EAGER.row("backward in another thread")
def other_thread(way: Way) -> Any:
    def backward(loss: torch.Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    return train(way, mlp(), backward=backward)


@EAGER.row("two threads, each with a model and a context")
def two_threads(way: Way) -> Any:
    models, found = [mlp(), mlp(2)], {}

    def work(number: int) -> None:
        found[number] = train(way, models[number])

    for number in range(2):  # one after the other, in threads of their own
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    return [found[0], found[1]]


@EAGER.row("autocast to bfloat16")
def autocast(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mean(model, x).float()

    return train(way, mlp(), loss_of)


@EAGER.row("autocast to float16 with GradScaler")
def scaler(way: Way) -> Any:
    model, scaler, found = mlp(), torch.amp.GradScaler("cpu", init_scale=256.0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with way.activations():
        for step in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = mean(model, batch(step))
            way.send()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            found += [loss.detach(), *grads(model)]
            optimizer.zero_grad()
    return found, [p.detach() for p in model.parameters()], scaler.get_scale()


@EAGER.row("bfloat16 throughout")
def bfloat16(way: Way) -> Any:
    return train(way, mlp().bfloat16(), lambda model, x: mean(model, x.bfloat16()))


@EAGER.row("float64")
def float64(way: Way) -> Any:
    return train(way, mlp().double(), lambda model, x: mean(model, x.double()))


@EAGER.row("hidden states kept by the user")
def hidden_states(way: Way) -> Any:
    kept: list[torch.Tensor] = []

    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = block(x)
            kept.append(x)
        return sum(state.square().mean() for state in kept[-3:])  # type: ignore[return-value]

    return train(way, mlp(), loss_of), [state.detach() for state in kept]


@EAGER.row("hooks of modules and tensors")
def hooks(way: Way) -> Any:
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda _, __, out: out * 2)
    model[1].register_full_backward_hook(lambda _, __, grad: seen.append(grad[0].clone()))
    model[2].up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        out.register_hook(lambda grad: grad * 0.5)
        return out.square().mean()

    return train(way, model, loss_of), seen


@EAGER.row("a closure's step (LBFGS)")
def lbfgs(way: Way) -> Any:
    model = mlp(2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = mean(model, batch(0))
        way.send()
        loss.backward()
        return loss

    with way.activations():
        return [optimizer.step(closure).detach(), *[p.detach() for p in model.parameters()]]  # type: ignore[union-attr]


@EAGER.row("keep_resident around a block", note="what the block saves, by wish")
def keep_resident(way: Way) -> Any:
    import ssdtrain

    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = model[0](x)
        with ssdtrain.keep_resident():
            x = model[1](x)
        return mean(model[2], x)

    return train(way, mlp(), loss_of)


@EAGER.row("recompute of every block")
def recompute(way: Way) -> Any:
    model = mlp()
    with way.activations(model, recompute="all"):
        loss = mean(model, batch(0))
        way.send()
        loss.backward()
    return [loss.detach(), *grads(model)]


# -- torch.func and forward mode ---------------------------------------------------------------------------------------


@EAGER.row("torch.func.functional_call")
def functional_call(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(model.named_parameters()), (x,)).square().mean()

    return train(way, mlp(), loss_of)


@EAGER.row("torch.func.vmap of the model")
def vmap(way: Way) -> Any:
    return train(way, mlp(), lambda model, x: torch.func.vmap(model)(x.view(4, -1, WIDTH)).square().mean())


@EAGER.row("forward mode: jvp")
def jvp(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            slope = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
            assert slope is not None
            return slope.square().mean()

    return train(way, mlp(), loss_of)


@EAGER.row("torch.func.grad", refused="saved tensor hooks")
def func_grad(way: Way) -> Any:
    model = mlp()
    named = dict(model.named_parameters())
    with way.activations():
        slopes = torch.func.grad(lambda p: torch.func.functional_call(model, p, (batch(0),)).square().mean())(named)
    return list(slopes.values())


# -- operators ---------------------------------------------------------------------------------------------------------


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin() / 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[0].cos() / 2


@EAGER.row("a custom autograd.Function")
def function(way: Way) -> Any:
    return train(way, mlp(), lambda model, x: mean(model, Halve.apply(model[0](x))))


class InFloat8(torch.autograd.Function):
    """A linear layer that saves its input in float8, with one scale for all of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        ctx.save_for_backward((x / scale).to(torch.float8_e4m3fn), scale, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ (x.float() * scale)


@EAGER.row("layers that save in float8")
def float8(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = x + InFloat8.apply(F.gelu(InFloat8.apply(block.norm(x), block.up.weight)), block.down.weight)
        return x.square().mean()

    return train(way, mlp(), loss_of)


@EAGER.row("operators in place")
def in_place(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = F.relu(block(x).mul_(0.5).add_(1), inplace=True)
        return x.square().mean()

    return train(way, mlp(), loss_of)


@EAGER.row("views, transposes and slices written to")
def views(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        y = model[0](x)
        left, right = y.t().chunk(2)
        z = torch.cat([left.tanh() * right, right.exp()]).t()
        z[:, ::2] = z[:, ::2].sigmoid()
        return mean(model[1:], z.contiguous())

    return train(way, mlp(), loss_of)


@EAGER.row("tied weights")
def tied(way: Way) -> Any:
    model = mlp()
    model[2].up.weight = model[0].up.weight
    return train(way, model)


@EAGER.row("embedding and cross entropy")
def embedding(way: Way) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, WIDTH), Block(), nn.Linear(WIDTH, 50))

    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        tokens = (x.abs() * 20).long() % 50
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return train(way, model, loss_of, 8, 16)


@EAGER.row("embedding with sparse gradients")
def sparse_gradient(way: Way) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, WIDTH, sparse=True), Block())
    return train(way, model, lambda model, x: mean(model, (x.abs() * 20).long() % 50), 8, 16)


@EAGER.row("a sparse matrix in the graph")
def sparse(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        matrix = (x * (x > 1)).t().mm(x).to_sparse()
        return mean(model[1:], torch.sparse.mm(matrix, model[0](x).t()).t())

    return train(way, mlp(), loss_of)


@EAGER.row("complex numbers, conjugated")
def complex_numbers(way: Way) -> Any:
    def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft(model(x))
        return (spectrum * spectrum.conj() + torch.fft.ifft(spectrum).exp()).abs().mean()

    return train(way, mlp(), loss_of)


@EAGER.row("convolution with channels_last, batch norm")
def convolution(way: Way) -> Any:
    torch.manual_seed(0)
    layers = [m for c in (3, 8) for m in (nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    found = train(way, model, lambda m, x: mean(m, x.to(memory_format=torch.channels_last)), 4, 3, 16, 16)
    return found, [b.clone() for b in model.buffers()]


@EAGER.row("LSTM")
def lstm(way: Way) -> Any:
    torch.manual_seed(0)
    return train(way, nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), lambda m, x: m(x)[0].square().mean(), 4, 16, WIDTH)


@EAGER.row("GRU cell, steps through time")
def gru(way: Way) -> Any:
    def loss_of(cell: Any, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(ROWS, WIDTH)
        for moment in x.unbind(1):
            state = cell(moment, state)
        return state.square().mean()

    torch.manual_seed(0)
    return train(way, nn.GRUCell(WIDTH, WIDTH), loss_of, ROWS, 4, WIDTH)


@EAGER.row("a transformer's encoder with dropout")
def transformer(way: Way) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, batch_first=True)
    return train(way, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), mean, 4, 16, WIDTH)


@EAGER.row("scaled dot product attention, causal")
def attention(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        y = model[0](x).view(4, 16, 4, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        return mean(model[1:], y.transpose(1, 2).reshape(4, 16, WIDTH))

    return train(way, mlp(), loss_of, 4, 16, WIDTH)


@EAGER.row("experts that run or not (MoE)")
def experts(way: Way) -> Any:
    from state_tools import MoE
    from state_tools import batch as tokens

    torch.manual_seed(0)
    return train(way, MoE(), lambda model, _: model(tokens(0)))
