"""Train a small GPT on real text under DeepSpeed, its saved activations on NVMe.

    torchrun --nproc-per-node 2 recipes/deepspeed/train_gpt.py --config recipes/deepspeed/ds_zero2.json
    deepspeed recipes/deepspeed/train_gpt.py --config recipes/deepspeed/ds_zero3_offload.json --dir '/nvme{local_rank}'

Without a GPU it runs on the CPU with gloo. The import of `ssdtrain.integrations.deepspeed` is all there is to
offloading; what is offloaded, and where to, is said by the section "ssdtrain" of the configuration.
"""

import argparse
import json
import os
import time

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

import ssdtrain.integrations.deepspeed  # noqa: F401  from here on `deepspeed.initialize` honours the section
from ssdtrain.tools.demo.model import GPT, GPTConfig
from ssdtrain.tools.demo.text import Text, read_text

parser = argparse.ArgumentParser(description="Train a byte-level GPT under DeepSpeed, activations on NVMe.")
parser.add_argument("--config", required=True, help="DeepSpeed configuration with a section `ssdtrain`")
parser.add_argument("--dir", help="folder on the drive, instead of the one in the configuration")
parser.add_argument("--no-offload", action="store_true", help="keep activations in memory")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--sequence", type=int, default=256, help="bytes per sequence")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--min-nbytes", help="smallest tensor that is offloaded, instead of the one in the configuration")
parser.add_argument("--mode", choices=["auto", "all"], help="what is offloaded, instead of that of the configuration")
parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
args = parser.parse_args()

# configuration
with open(args.config) as file:
    config = json.load(file)
config["ssdtrain"]["enabled"] = not args.no_offload
config["ssdtrain"]["activations"]["directory"] = args.dir or config["ssdtrain"]["activations"]["directory"]
if args.min_nbytes:
    config["ssdtrain"]["activations"]["min_nbytes"] = args.min_nbytes
if args.mode:
    config["ssdtrain"]["activations"]["mode"] = args.mode
if not torch.cuda.is_available():
    # gloo alone will do: DeepSpeed's shared-memory operator takes minutes to compile
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# model and data
deepspeed.init_distributed()
rank, num_ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
torch.manual_seed(0)
text = Text(read_text(None), seed=0)
model = GPT(GPTConfig(args.layers, args.width, args.heads, args.sequence))
engine, *_ = deepspeed.initialize(args=None, model=model, config=config)
micro_batch, micro_steps = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()

# training: as without ssdtrain
for step in range(args.steps):
    start, total = time.perf_counter(), 0.0
    for micro in range(micro_steps):
        index = (step * micro_steps + micro) * num_ranks + rank
        tokens, targets = text.batch(index, size=micro_batch, sequence=args.sequence)
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        total += loss.item() / micro_steps
    if rank == 0:
        print(f"step {step:4d} | loss {total:.6f} | {time.perf_counter() - start:.2f} s", flush=True)

if rank == 0:
    print(engine.ssdtrain.stats, flush=True)
engine.destroy()
torch.distributed.destroy_process_group()
