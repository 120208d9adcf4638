r"""Pre-train a byte-level GPT with megatron-core, its saved activations on NVMe. One file, one loop.

torchrun --nproc-per-node 2 recipes/megatron/pretrain_gpt.py --ssdtrain-dir /mnt/nvme    # 2 GPUs, or 2 CPU processes
torchrun --nproc-per-node 2 recipes/megatron/pretrain_gpt.py                             # the same losses, more memory
torchrun --nproc-per-node 8 recipes/megatron/pretrain_gpt.py --ssdtrain-dir /mnt/nvme/{local_rank} \
    --tensor 2 --pipeline 2 --layers 24 --hidden 2048 --heads 16 --sequence 2048
"""

import argparse
import contextlib
import os
import time

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from ssdtrain.integrations.megatron import add_arguments, wrap_forward_step
from ssdtrain.tools.demo.text import Text, read_text

VOCABULARY = 256  # bytes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train a byte-level GPT, its saved activations on NVMe.")
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel size")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512, help="bytes per sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument(
        "--num-micro-batches", type=int, default=2, help="micro-batches per step and data-parallel rank"
    )
    parser.add_argument("--recompute", choices=["full", "selective"], help="recompute activations as well")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="text file; default: Python's standard library sources")
    args = add_arguments(parser).parse_args()
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.world_size % (args.tensor * args.pipeline):
        parser.error(
            f"Expected a number of processes that tensor x pipeline = {args.tensor * args.pipeline} divides, "
            f"got {args.world_size}; start with torchrun --nproc-per-node, or change --tensor and --pipeline"
        )
    return args


def make_model(args: argparse.Namespace) -> DistributedDataParallel:
    is_cuda = torch.cuda.is_available()
    precision = {"bf16": True, "params_dtype": torch.bfloat16} if is_cuda else {}
    recompute = {"recompute_method": "uniform", "recompute_num_layers": 1} if args.recompute == "full" else {}
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        tensor_model_parallel_size=args.tensor,
        pipeline_model_parallel_size=args.pipeline,
        pipeline_dtype=torch.bfloat16 if is_cuda else torch.float32,
        deallocate_pipeline_outputs=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not is_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=args.recompute,
        **recompute,
        **precision,
    )
    has_engine = is_cuda and specs.HAVE_TE
    layer = specs.get_gpt_layer_with_transformer_engine_spec if has_engine else specs.get_gpt_layer_local_spec
    model = GPTModel(
        config,
        layer() if has_engine else layer(normalization="RMSNorm"),
        VOCABULARY,
        args.sequence,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    model = model.cuda() if is_cuda else model
    if is_cuda:
        from megatron.core.transformer.module import Float16Module

        model = Float16Module(config, model)
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)


def batches(args: argparse.Namespace, text: Text, step: int):
    """The micro-batches of a step; every data-parallel rank has its own."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i in range(args.num_micro_batches):
        number = (step * args.num_micro_batches + i) * size + rank
        tokens, targets = text.batch(number, size=args.micro_batch, sequence=args.sequence)
        yield tokens.to(device), targets.to(device)


def loss_function(losses: torch.Tensor):
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def forward_step(data_iterator, model):
    tokens, targets = next(data_iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    return model(tokens, positions, mask, labels=targets), loss_function


def train(args: argparse.Namespace) -> None:
    parallel_state.initialize_model_parallel(args.tensor, args.pipeline)
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed)
    is_printing = torch.distributed.get_rank() == args.world_size - 1  # the last stage has the losses
    text = Text(read_text(args.data), seed=args.seed)
    model = make_model(args)
    options = OptimizerConfig(
        optimizer="adam", lr=args.lr, bf16=model.config.bf16, params_dtype=model.config.params_dtype,
        use_distributed_optimizer=True, clip_grad=1.0,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, [model])
    step_function = wrap_forward_step(
        forward_step, args
    )  # this line, and add_arguments, are all there is to offloading
    for step in range(args.steps):
        start = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=step_function,
            data_iterator=batches(args, text, step),
            model=model,
            num_microbatches=args.num_micro_batches,
            seq_length=args.sequence,
            micro_batch_size=args.micro_batch,
        )
        optimizer.step()
        if is_printing:
            loss = torch.stack([entry["loss"] for entry in losses]).mean()
            print(f"step {step:4d} | loss {loss.item():.6f} | {time.perf_counter() - start:.2f} s", flush=True)
    if is_printing and step_function.offload is not None:
        print(step_function.offload.stats, flush=True)


def main() -> None:
    args = parse_args()
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        context = contextlib.nullcontext()
    else:
        import cpu  # beside this file: answers what megatron-core asks torch.cuda

        context = cpu.stand_in()
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo")
    with context:
        train(args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
