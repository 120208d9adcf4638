r"""The longest sequence that trains, and what a token costs: checkpointing, its inputs on a drive, loss in chunks.

    python recipes/transformers/long_context.py /mnt/nvme --cap 2GiB              # a table, on any machine, as root
    python recipes/transformers/long_context.py /mnt/nvme --method "checkpointing with ssdtrain" --device cuda \
        --model meta-llama/Llama-3.1-8B --dtype bfloat16 --length 500000          # one method, one length, a GPU
    python recipes/transformers/long_context.py /mnt/nvme --cap 2GiB --method plain --length 64    # null: needs more

Transformers' model is not touched: its own switch turns checkpointing on, `use_checkpoint` offloads all that a
layer is called with, and the head runs on `--chunk` tokens at a time, recomputed in backward: one layer stays in
memory.

The cap is on the memory of a process, its pages of files included (a control group, without swap, which kills who
needs more; needs root). The length is doubled until a trial dies, then the gap is halved until it is an eighth. Time
per token is that of the last of two steps, at the longest length of checkpointing alone, and at the method's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ssdtrain
from ssdtrain.integrations.transformers import use_checkpoint
from ssdtrain.policy import Nbytes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from memory_group import memory_group, why_not

METHODS = ("plain", "checkpointing", "checkpointing with ssdtrain", "ssdtrain, recompute auto")
_GLIBC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


# -- one method at one length ------------------------------------------------------------------------------------------


def model_of(args: argparse.Namespace) -> Any:
    """Llama-shaped, of random weights unless it has a name."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_cache=False).to(args.device)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=8 * args.width // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=1 << 20,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(args.device, dtype)


def offload_of(args: argparse.Namespace, model: torch.nn.Module) -> Any:
    """What is round forward."""
    sizes = {name: getattr(args, name) for name in ("min_nbytes", "staging_nbytes", "prefetch_nbytes")}
    if args.method == "checkpointing with ssdtrain":
        return ssdtrain.offload_activations(args.directory, sizes | {"mode": "all"}, model)
    if args.method == "ssdtrain, recompute auto":
        chosen = sizes | {"memory_budget": args.budget, "recompute": "auto"}
        return ssdtrain.offload_activations(args.directory, chosen, model)
    return nullcontext()


def loss_of(model: Any, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Mean over all tokens but the last; never more than a chunk's logits at a time."""
    hidden = model.model(input_ids=tokens[None, :-1]).last_hidden_state[0]

    def of_chunk(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    parts = zip(hidden.split(chunk), tokens[1:].split(chunk), strict=True)
    losses = [ssdtrain.checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() / (len(tokens) - 1)


def update_in_backward(model: torch.nn.Module, rate: float) -> None:
    """Takes a step of SGD for each weight as soon as its gradient is there: gradients take no room."""

    def update(weight: torch.Tensor) -> None:
        with torch.no_grad():
            weight.add_(weight.grad, alpha=-rate)
        weight.grad = None

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(update)


def text(length: int, vocabulary: int) -> torch.Tensor:
    """Bytes of the standard library: real text on every machine."""
    folder = Path(argparse.__file__).parent
    source, files = b"", sorted(folder.glob("*.py"))
    while len(source) < length + 1:
        source += b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(source[: length + 1]), dtype=torch.uint8).long() % vocabulary


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Takes some steps."""
    model = model_of(args).train()
    if args.method.startswith("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    if args.method == "checkpointing with ssdtrain":
        use_checkpoint(model)
    tokens = text(args.length, model.config.vocab_size).to(args.device)
    update_in_backward(model, 1e-2)
    offload, losses, seconds, cpu_seconds = offload_of(args, model), [], [], []
    for _ in range(args.steps):
        begin, cpu = time.perf_counter(), time.process_time()
        with offload:
            loss = loss_of(model, tokens, args.chunk)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
        print(f"step {len(seconds)} of {args.steps}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    found = {"method": args.method, "length": args.length, "losses": losses, "token_seconds": seconds[-1] / args.length}
    found |= {"token_cpu_seconds": cpu_seconds[-1] / args.length}
    if isinstance(offload, ssdtrain.ActivationOffload):
        stats = offload.stats
        found |= {"written_nbytes": stats.written_nbytes, "stall_seconds": stats.stall_seconds}
        found |= {"num_demand_reloads": stats.num_demand_reloads, "num_prefetched": stats.num_prefetched}
        found |= {"seconds": seconds, "plan": stats.plan, "fallbacks": list(stats.fallbacks)}
    return found


# -- the longest -------------------------------------------------------------------------------------------------------


def trial(method: str, length: int, args: argparse.Namespace, steps: int) -> dict[str, Any] | None:
    """What a process of its own came to; None when the cap did not let it."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in _FORWARDED]
    own = ["--method", method, "--length", str(length), "--steps", str(steps)]
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(args.cap)) if args.cap else None
        command = [*(group.command if group else []), sys.executable, __file__, args.directory, *options, *own]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | _GLIBC)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found | ({"peak_nbytes": group.peak_nbytes} if group else {})
        if group is not None and group.num_kills:
            return None
    raise RuntimeError(
        f"Expected {method} at {length} tokens to train or to need too much, got:\n{done.stderr[-2000:]}"
    )


def longest(method: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """By doubling, then halving the gap until it is an eighth; no more than `--most`."""
    fits, length, too_long = None, args.first, 0
    while length <= args.most:
        found = trial(method, length, args, 1)
        if found is None:
            too_long = length
            break
        fits, length = found, 2 * length
    while fits is not None and too_long and too_long - fits["length"] > fits["length"] // 8:
        middle = (fits["length"] + too_long) // 2
        found = trial(method, middle, args, 1)
        fits, too_long = (found, too_long) if found is not None else (fits, middle)
    return fits


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method, printed as it comes."""
    rows = []
    for method in METHODS:
        found = longest(method, args)
        rows.append({"method": method, "length": found["length"] if found else 0})
        print(f"{method}: {rows[-1]['length']} tokens", file=sys.stderr, flush=True)
    common = rows[1]["length"]
    for row in rows:
        for name, length in (("common", common), ("own", row["length"])):
            if 0 < length <= row["length"]:
                row[name] = trial(row["method"], length, args, 2)
    print("| | longest, tokens | x | peak | ms per token, at the common length | at its own |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        times = [f"{1e3 * row[name]['token_seconds']:.2f}" if row.get(name) else "-" for name in ("common", "own")]
        nbytes = (row.get("own") or {}).get("peak_nbytes")
        peak = f"{nbytes / 2**20:.0f} MiB" if nbytes else "-"
        ratio = row["length"] / max(1, common)
        print(f"| {row['method']} | {row['length']} | {ratio:.2f} | {peak} | {times[0]} | {times[1]} |")
    return rows


_FORWARDED = (
    "device model dtype layers width heads vocab chunk min_nbytes staging_nbytes prefetch_nbytes budget".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = TypeAdapter(Nbytes).validate_python
    parser.add_argument("directory", help="where spill files go, on a fast local drive")
    parser.add_argument("--cap", type=size, default=0, help="such as 2GiB; without one the longest is --most")
    parser.add_argument("--first", type=int, default=1024, help="length to begin with")
    parser.add_argument("--most", type=int, default=1 << 20, help="longest to try")
    parser.add_argument("--method", choices=METHODS, help="this one alone, at --length")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", default="", help="name or folder of a Llama; else one of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens whose logits there are at a time")
    parser.add_argument("--min-nbytes", default="64KiB")
    parser.add_argument("--staging-nbytes", default="4MiB")
    parser.add_argument("--prefetch-nbytes", default="4MiB")
    parser.add_argument("--budget", default="48MiB", help="memory_budget of recompute='auto'")
    args = parser.parse_args()
    if args.cap and why_not():
        raise SystemExit(f"Expected to be able to cap memory, got: {why_not()}")
    if args.method:
        print(json.dumps(trial(args.method, args.length, args, args.steps) if args.cap else train(args)))
        return
    print(json.dumps(table(args)))


if __name__ == "__main__":
    main()
