"""Fine-tunes a byte-level GPT without backward (MeZO), its parameters streamed from NVMe block by block.

python recipes/zeroth_order/mezo.py --dir /mnt/nvme
python recipes/zeroth_order/mezo.py --no-offload            # plain MeZO: the same losses, more memory

See README.md beside this file for the method and its papers.
"""

import argparse
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import cross_entropy, linear

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig
from ssdtrain.tools.demo.text import Text, read_text

parser = argparse.ArgumentParser(description="Fine-tune a GPT with MeZO, its parameters on NVMe.")
parser.add_argument("--dir", default=".", help="folder on the drive that parameters are kept on")
parser.add_argument("--no-offload", action="store_true", help="plain MeZO, all parameters in memory")
parser.add_argument("--checkpoint", help="safetensors of a GPT of this shape; default: pretrain one now")
parser.add_argument("--pretrain", type=int, default=100, help="steps of pretraining where there is no checkpoint")
parser.add_argument("--data", help="text to fine-tune on; default: the text of pretraining, other parts of it")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--sequence", type=int, default=128)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--lr", type=float, default=2e-5)
parser.add_argument("--eps", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

Parameters = list[tuple[int, torch.nn.Parameter]]  # with the number that its directions are drawn from


def move(parameters: Parameters, step: int, scale: float) -> None:
    """Adds `scale` times the step's direction."""
    for number, parameter in parameters:
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 100_003 + number)
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(direction, alpha=scale)


def pretrained() -> dict[str, torch.Tensor]:
    """A small GPT that has seen the sources of Python's standard library."""
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(args.layers, args.width, args.heads, args.sequence))
    text = Text(read_text(None), seed=args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(args.pretrain):
        loss = model(*text.batch(step, size=args.batch, sequence=args.sequence))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"pretraining, step {step:4d} | loss {loss.item():.4f}")
    return model.state_dict()


class Streamed:
    """Both forwards of a step, block by block. What is outside the blocks stays in memory, in each of its values."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        named = [(name, (i, p)) for i, (name, p) in enumerate(model.named_parameters())]
        self.outer = [entry for name, entry in named if not name.startswith("blocks.")]
        self.blocks = [[e for name, e in named if name.startswith(f"blocks.{i}.")] for i in range(args.layers)]

    @torch.no_grad()
    def losses(self, step: int, late: float, tokens: torch.Tensor, targets: torch.Tensor) -> list[float]:
        """After the update of the step before, by `late` along its direction: the losses at +eps and -eps."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * 2
        values: list[list[torch.Tensor]] = [[], []]

        def embed(which: int) -> None:
            hidden[which] = self.model.tokens(tokens) + self.model.positions.weight[: tokens.shape[1]]
            values[which] = [p.data.clone() for _, p in self.outer]

        self.move_and_run(self.outer, step, late, embed)
        for i, parameters in enumerate(self.blocks):
            with self.in_memory(i):

                def block(which: int, i: int = i) -> None:
                    hidden[which] = self.model.blocks[i](hidden[which])

                self.move_and_run(parameters, step, late, block)
        values.append([p.data for _, p in self.outer])
        found = []
        for which, own in enumerate(values):
            for (_, parameter), value in zip(self.outer, own, strict=True):
                parameter.data = value
            if which < 2:
                logits = linear(self.model.norm(hidden[which]), self.model.tokens.weight)
                found.append(cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
        return found

    def move_and_run(self, parameters: Parameters, step: int, late: float, run: Callable[[int], None]) -> None:
        """Everything a step does with these parameters, while they are in memory."""
        if step:
            move(parameters, step - 1, late)
        move(parameters, step, args.eps)
        run(0)
        move(parameters, step, -2 * args.eps)
        run(1)
        move(parameters, step, args.eps)

    @contextlib.contextmanager
    def in_memory(self, block: int) -> Iterator[None]:
        """A block's parameters, while the next one's are read."""
        parameters = ssdtrain.parameter_offload(self.model)
        with parameters.gathered(f"blocks.{block}.*"):
            parameters.prefetch(p for _, p in self.blocks[(block + 1) % len(self.blocks)])
            yield

    def finish(self, step: int, late: float) -> None:
        """The update of the last step, which no other follows."""
        move(self.outer, step, late)
        for i, parameters in enumerate(self.blocks):
            with self.in_memory(i):
                move(parameters, step, late)


class Plain:
    """MeZO as it is published: all parameters are moved, then the whole model runs."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.parameters = list(enumerate(model.parameters()))

    @torch.no_grad()
    def losses(self, step: int, late: float, tokens: torch.Tensor, targets: torch.Tensor) -> list[float]:
        """See `Streamed.losses`."""
        if step:
            move(self.parameters, step - 1, late)
        found = []
        for scale in (args.eps, -2 * args.eps):
            move(self.parameters, step, scale)
            found.append(self.model(tokens, targets).item())
        move(self.parameters, step, args.eps)
        return found

    def finish(self, step: int, late: float) -> None:
        """See `Streamed.finish`."""
        move(self.parameters, step, late)


# data and model
text = Text(read_text(args.data), seed=args.seed + 1)
model = GPT(GPTConfig(args.layers, args.width, args.heads, args.sequence))
if args.checkpoint:
    ssdtrain.load_safetensors(model, args.checkpoint)
else:
    model.load_state_dict(pretrained())
method: Streamed | Plain = Plain(model)
if not args.no_offload:
    ssdtrain.offload_parameters(model, args.dir)
    method = Streamed(model)

# fine-tuning
late = 0.0
for step in range(args.steps):
    start = time.perf_counter()
    tokens, targets = text.batch(step, size=args.batch, sequence=args.sequence)
    plus, minus = method.losses(step, late, tokens, targets)
    late = -args.lr * (plus - minus) / (2 * args.eps)
    print(f"step {step:4d} | loss {(plus + minus) / 2:.6f} | {time.perf_counter() - start:.2f} s")
method.finish(args.steps - 1, late)

if not args.no_offload:
    print(ssdtrain.parameter_offload(model).stats)
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.numpy())
print(f"parameters {digest.hexdigest()}")
