"""Run a pre-training script of a Megatron-LM checkout, unchanged, with its saved activations on NVMe.

torchrun --nproc-per-node 2 recipes/megatron/run.py ~/Megatron-LM/pretrain_gpt.py --ssdtrain-dir /mnt/nvme ...

The script's call of `pretrain` gets two things more: the --ssdtrain options, and a forward step that offloads. In a
script of your own write those two into the call; this file is then not needed.
"""

import functools
import inspect
import runpy
import sys
from pathlib import Path

from ssdtrain.integrations.megatron import add_arguments, wrap_forward_step


def offloading(pretrain, get_args):
    """`pretrain`, offloading when the options ask for it."""

    @functools.wraps(pretrain)
    def pretrain_offloading(*args, **kwargs):
        call = inspect.signature(pretrain).bind(*args, **kwargs)
        theirs = call.arguments.get("extra_args_provider")
        forward_step = wrap_forward_step(call.arguments["forward_step_func"], get_args)
        call.arguments["forward_step_func"] = forward_step
        call.arguments["extra_args_provider"] = lambda parser: add_arguments(theirs(parser) if theirs else parser)
        result = pretrain(*call.args, **call.kwargs)
        if forward_step.offload is not None:
            print(f"rank {get_args().rank}: {forward_step.offload.stats}", flush=True)
        return result

    return pretrain_offloading


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("Expected the path of a Megatron-LM script, got none: run.py ~/Megatron-LM/pretrain_gpt.py ...")
    script = sys.argv[1]
    if not Path(script).is_file():
        sys.exit(f"Expected a script of a Megatron-LM checkout, got {script!r}; set MEGATRON_LM to the checkout")
    del sys.argv[0]
    sys.path.insert(0, str(Path(script).resolve().parent))
    import megatron.training as training

    training.pretrain = offloading(training.pretrain, training.get_args)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
