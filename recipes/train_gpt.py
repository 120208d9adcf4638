"""Train a byte-level GPT on text, its saved activations on NVMe. One file, one loop, nothing hidden.

python recipes/train_gpt.py --dir /mnt/nvme                 # 25 M parameters on Python's own sources
python recipes/train_gpt.py --dir /mnt/nvme --data my.txt --layers 24 --width 768 --heads 12
python recipes/train_gpt.py --no-offload                    # the same numbers, more memory
"""

import argparse
import time

import torch

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig
from ssdtrain.tools.demo.text import Text, read_text

parser = argparse.ArgumentParser(description="Train a byte-level GPT, its saved activations on NVMe.")
parser.add_argument("--dir", default=".", help="folder on the drive that activations are offloaded to")
parser.add_argument("--no-offload", action="store_true", help="keep activations in memory")
parser.add_argument("--min-nbytes", default="1MiB", help="smallest tensor that is offloaded")
parser.add_argument("--data", help="text file; default: Python's standard library sources")
parser.add_argument("--layers", type=int, default=14)
parser.add_argument("--width", type=int, default=384)
parser.add_argument("--heads", type=int, default=6)
parser.add_argument("--batch", type=int, default=8, help="sequences per step")
parser.add_argument("--sequence", type=int, default=512, help="bytes per sequence")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

# data and model
torch.manual_seed(args.seed)
text = Text(read_text(args.data), seed=args.seed)
model = GPT(GPTConfig(args.layers, args.width, args.heads, args.sequence)).to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
num_parameters = sum(p.numel() for p in model.parameters())
print(f"{num_parameters / 1e6:.1f} M parameters, {len(text) / 1e6:.1f} MB of text, on {args.device}")

# training: the context manager round the loop is all there is to offloading
policy = ssdtrain.ActivationPolicy(enabled=not args.no_offload, min_nbytes=args.min_nbytes)
with ssdtrain.offload_activations(args.dir, policy=policy, model=model) as offload:
    for step in range(args.steps):
        start = time.perf_counter()
        tokens, targets = text.batch(step, size=args.batch, sequence=args.sequence)
        loss = model(tokens.to(args.device), targets.to(args.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:4d} | loss {loss.item():.6f} | {time.perf_counter() - start:.2f} s")

print(offload.stats)
