"""How much longer does a Megatron step take with ssdtrain? One case, steps with and without taking turns.

python recipes/benchmarks/megatron_overhead.py /mnt/nvme                # one process; the last line is JSON
torchrun --nproc-per-node 2 recipes/benchmarks/megatron_overhead.py /mnt/nvme --tensor 2

Both trainings are alive at once and take their steps in turn, the first one alternating, so that what else the machine
does hits both. The overhead is the median over pairs of steps of the ratio of their times: 1.00 is none. The same ratio
of processor time (all threads) is beside it: on a machine where others compute, that is what waiting multiplies. On a
machine with few cores say `OMP_NUM_THREADS` one less than there are: the engine's threads copy while training computes.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "megatron"))
warnings.filterwarnings("ignore", module="megatron")

import cpu  # noqa: E402
import megatron.core  # noqa: E402
import pretrain_gpt as recipe  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

import ssdtrain  # noqa: E402
from ssdtrain.devices.vector_math import settle_vector_math  # noqa: E402
from ssdtrain.integrations.megatron import offload_schedule  # noqa: E402
from ssdtrain.tools.demo.text import Text, standard_library  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Overhead of ssdtrain in a Megatron step.")
    parser.add_argument("directory", help="folder on the drive that activations are offloaded to")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps that count")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--min-nbytes", default="1MiB")
    parser.add_argument(
        "--mode", default="auto", choices=["auto", "all"], help="what is offloaded; a toy only with all"
    )
    args = parser.parse_args()
    fixed = {"pipeline": 1, "heads": 4, "num_micro_batches": 2, "recompute": None}
    return argparse.Namespace(**vars(args), **fixed)


class Training:
    """One model with its optimizer and schedule."""

    def __init__(self, args: argparse.Namespace, schedule) -> None:
        settle_vector_math()  # both trainings are compared to the bit
        torch.manual_seed(0)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        self.args, self.schedule = args, schedule
        self.model = recipe.make_model(args)
        options = OptimizerConfig(
            optimizer="adam",
            lr=3e-4,
            bf16=self.model.config.bf16,
            params_dtype=self.model.config.params_dtype,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])

    def step(self, text: Text, number: int) -> tuple[float, float, torch.Tensor]:
        """Seconds of a step by the clock and of processors, and its losses."""
        torch.distributed.barrier()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.schedule(
            forward_step_func=recipe.forward_step,
            data_iterator=recipe.batches(self.args, text, number),
            model=self.model,
            num_microbatches=self.args.num_micro_batches,
            seq_length=self.args.sequence,
            micro_batch_size=self.args.micro_batch,
        )
        self.optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        return seconds, cpu_seconds, torch.stack([entry["loss"] for entry in losses])


def measure(args: argparse.Namespace) -> dict[str, object]:
    parallel_state.initialize_model_parallel(args.tensor)
    schedule = get_forward_backward_func()
    offloading = offload_schedule(
        schedule, args.directory, {"min_nbytes": args.min_nbytes, "mode": args.mode, "decline_below_nbytes": 0}
    )
    text = Text(standard_library())
    trainings = [Training(args, schedule), Training(args, offloading)]
    pairs = []
    for number in range(args.pairs + 2):  # the first two pairs warm up
        order = trainings if number % 2 == 0 else trainings[::-1]
        results = {training: training.step(text, number) for training in order}
        (*plain, plain_losses), (*ours, our_losses) = (results[training] for training in trainings)
        if not torch.equal(plain_losses, our_losses):
            raise RuntimeError(f"Expected equal losses, got {plain_losses} and {our_losses} in step {number}")
        pairs.append((plain, ours))
    pairs = pairs[2:]
    stats = offloading.offload.stats
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "ssdtrain": ssdtrain.__version__,
        },
        "plain_seconds": statistics.median(plain[0] for plain, _ in pairs),
        "ssdtrain_seconds": statistics.median(ours[0] for _, ours in pairs),
        "overhead": statistics.median(ours[0] / plain[0] for plain, ours in pairs),
        "processor_overhead": statistics.median(ours[1] / plain[1] for plain, ours in pairs),
        "pairs": pairs,
        "offloaded_nbytes": stats.offloaded_nbytes,
        "peak_saved_nbytes": stats.peak_saved_nbytes,
        "stall_seconds": stats.stall_seconds,
    }


def main() -> None:
    args = parse_args()
    is_cuda = torch.cuda.is_available()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}.items():
        os.environ.setdefault(name, value)
    if is_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo")
    with contextlib.nullcontext() if is_cuda else cpu.stand_in():
        result = measure(args)
    if torch.distributed.get_rank() == 0:
        times = f"{result['plain_seconds']:.3f} s without, {result['ssdtrain_seconds']:.3f} s with"
        print(f"{times}: x {result['overhead']:.3f}, of processor time x {result['processor_overhead']:.3f}")
        print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
