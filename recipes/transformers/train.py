"""Hugging Face's Trainer with activations and optimizer state on a drive: one callback.

    python recipes/transformers/train.py --dir /mnt/nvme --steps 20
    torchrun --nproc-per-node 2 recipes/transformers/train.py --dir "/mnt/nvme{local_rank}"

`--no-offload` trains the same numbers, to the bit, with everything in memory.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ssdtrain.integrations.transformers


def texts(length: int, num: int = 512) -> list[dict[str, torch.Tensor]]:
    """Bytes of a file of the standard library: real text on every machine."""
    with open(argparse.__file__, "rb") as file:
        source = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    starts = torch.randint(len(source) - length, (num,), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": source[s : s + length], "labels": source[s : s + length]} for s in starts.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where spill files go")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--no-offload", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        use_cache=False,
    )
    offload = ssdtrain.integrations.transformers.Offload(
        args.dir,
        activations={"min_nbytes": "64KiB", "decline_below_nbytes": 0},  # a toy: nothing is gained
        optimizer={"chunk_nbytes": "4MiB"},
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=TrainingArguments(
                output_dir=output,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                logging_steps=max(1, args.steps // 4),
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=texts(args.length),
            callbacks=[] if args.no_offload else [offload],
        )
        print(f"loss {trainer.train().training_loss:.6f}")
    if not args.no_offload:
        print(offload.session.stats, *offload.session.state_stats, sep="\n")


if __name__ == "__main__":
    main()
