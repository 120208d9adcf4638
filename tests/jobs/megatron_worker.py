"""One rank of `test_megatron.py`: runs cases and checks one after the other and writes what it saw as JSON.

torchrun megatron_worker.py FOLDER NAME...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inside

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "megatron"))
warnings.simplefilter("ignore")  # megatron-core's own, by the dozen; the test process lets none through

import cpu  # noqa: E402
import megatron_models as models  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules  # noqa: E402
from megatron.core.utils import get_model_config, make_viewless_tensor  # noqa: E402
from megatron_models import Case  # noqa: E402

import ssdtrain  # noqa: E402
from ssdtrain.integrations.megatron import Offload, add_arguments, offload_schedule, wrap_forward_step  # noqa: E402
from ssdtrain.store.saved_tensors import innermost_hooks  # noqa: E402

NUM_STEPS = int(os.environ.get("NUM_STEPS", "5"))
STAGING = PREFETCH = 512 * 1024
POLICY = {"mode": "all", "min_nbytes": "16KiB", "staging_nbytes": STAGING, "prefetch_nbytes": PREFETCH}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "allgather"}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
# A recomputed MLP hands out its bias, a parameter, as its own output: backward then never ends, without ssdtrain too.
NO_BIAS = {"add_bias_linear": False}

ALONE = {
    "plain": Case(is_plain=True),
    "ddp": Case(),
    "distributed-optimizer": Case(has_distributed_optimizer=True),
    "bf16": Case(has_distributed_optimizer=True, config=BF16),
    "dropout": Case(num_layers=4, config={"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "full-recompute": Case(config=FULL),
    "selective-recompute": Case(config=SELECTIVE | NO_BIAS),
    "experts": Case(num_layers=2, config=EXPERTS | NO_BIAS),
    "megatron-lm": Case(is_megatron_lm=True),
}
PAIR = {
    "tensor": Case(tp=2),
    "sequence": Case(tp=2, config={"sequence_parallel": True}),
    "sequence-selective": Case(tp=2, config={"sequence_parallel": True} | SELECTIVE | NO_BIAS),
    "distributed-checkpoints": Case(tp=2, config=FULL | {"distribute_saved_activations": True}),
    "pipeline": Case(pp=2),
    "pipeline-megatron-lm": Case(pp=2, is_megatron_lm=True),
    "pipeline-keeps-outputs": Case(pp=2, num_layers=4, config={"deallocate_pipeline_outputs": False}),
    "pipeline-full-recompute": Case(pp=2, num_layers=4, config=FULL),
    "interleaved": Case(pp=2, vp=2, num_layers=8),
    "context": Case(cp=2),
    "data": Case(),
    "data-distributed-optimizer": Case(has_distributed_optimizer=True),
    "experts-parallel": Case(ep=2, num_layers=2, config=EXPERTS | NO_BIAS),
}


# -- cases: trained without and with ssdtrain --------------------------------------------------------------------------


def run_case(case: Case, directory: str) -> dict[str, Any]:
    schedule = get_forward_backward_func()
    trainer = models.Trainer(case)
    counter = models.Kept(trainer.parameters)

    def counted(data_iterator: Any, model: torch.nn.Module) -> Any:
        with counter:
            return models.forward_step(data_iterator, model)

    plain = [trainer.step(i, schedule, counted) for i in range(NUM_STEPS)] + [trainer.weights()]
    trainer = models.Trainer(case)
    step, offloading = offloaded(case, schedule, directory)
    ours = [step(trainer, i) for i in range(NUM_STEPS)] + [trainer.weights()]
    offload = offloading.offload
    stats = offload.stats
    result = {
        "is_equal": all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(plain, ours, strict=True)),
        "num_compared": sum(map(len, plain)),
        "kept_nbytes": counter.peak_nbytes,
        "file_nbytes": spill_nbytes(directory),
        "num_in_flight": num_in_flight(case),
        "skipped": {reason: dataclasses.asdict(skipped) for reason, skipped in stats.skipped.items()},
    }
    names = "peak_saved_nbytes peak_disk_nbytes written_nbytes read_nbytes num_live_records num_offloaded fallbacks"
    result |= {name: getattr(stats, name) for name in names.split()}
    result["weights_stay"] = weights_stay(offload, trainer)
    offload.close()
    return result


def offloaded(case: Case, schedule: Callable[..., Any], directory: str) -> tuple[Callable[..., Any], Any]:
    """A training step that offloads, and the object that has the offload."""
    if not case.is_megatron_lm:
        wrapped = offload_schedule(schedule, directory, POLICY)
        return lambda trainer, i: trainer.step(i, wrapped), wrapped
    options = [x for name, value in POLICY.items() for x in (f"--ssdtrain-{name.replace('_', '-')}", str(value))]
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--ssdtrain-dir", directory, *options])
    forward_step = wrap_forward_step(models.forward_step, lambda: args)
    return lambda trainer, i: trainer.step(i, schedule, forward_step), forward_step


def num_in_flight(case: Case) -> int:
    """Forward steps of this rank that wait for their backward at once, by Megatron's schedules."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    if case.vp is not None:
        warmup = 2 * (case.pp - rank - 1) + (case.vp - 1) * case.pp
        return min(warmup, case.num_microbatches * case.vp) + 1
    return case.pp - rank


def spill_nbytes(directory: str) -> int:
    """What the spill files of this process really take on the drive."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{name}")
            if path.startswith(directory) and path.endswith("(deleted)"):
                total += os.stat(f"/proc/self/fd/{name}").st_blocks * 512
    return total


def weights_stay(offload: ssdtrain.ActivationOffload, trainer: models.Trainer) -> bool:
    """Whether parameters, views of them and their gradient buffers are known, and stay when they are saved."""
    before = offload.stats.num_offloaded
    with offload:
        for weight in trainer.parameters:
            for saved in (weight, weight.view(-1), weight.detach(), weight.T, getattr(weight, "main_grad", weight)):
                graphs = torch.ones((), requires_grad=True) * saved
                del graphs
    return offload.stats.num_offloaded == before


# -- checks: what goes wrong, and what Megatron does behind autograd's back --------------------------------------------


def message_of(call: Callable[[], Any]) -> str:
    """The error of a call that must fail."""
    try:
        call()
    except (RuntimeError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def check_missing_directory(folder: Path) -> Any:
    """Rank 1 has no directory of its own; both ways of starting."""
    parallel_state.initialize_model_parallel()
    directory = str(folder / "rank{rank}")
    if torch.distributed.get_rank() == 0:
        (folder / "rank0").mkdir()
    torch.distributed.barrier()
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--ssdtrain-dir", directory])
    return [
        message_of(lambda: offload_schedule(get_forward_backward_func(), directory)),
        message_of(lambda: wrap_forward_step(models.forward_step, args)),
    ]


def check_missing_directory_in_pipeline(folder: Path) -> Any:
    """The second stage has no directory, and finds out in its first forward, when the first stage has done its own."""
    case = Case(pp=2)
    parallel_state.initialize_model_parallel(1, 2)
    directory = str(folder / "stage{rank}")
    if torch.distributed.get_rank() == 0:
        (folder / "stage0").mkdir()
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--ssdtrain-dir", directory, "--ssdtrain-mode", "all"])
    forward_step = wrap_forward_step(models.forward_step, lambda: args)
    trainer = models.Trainer(case)
    config = get_model_config(trainer.model[0])
    finalize = config.finalize_model_grads_func
    first = message_of(lambda: trainer.step(0, get_forward_backward_func(), forward_step))
    assert config.finalize_model_grads_func is finalize, "the configuration is as it was"
    return [first, message_of(lambda: wrap_again(case, directory))]


def wrap_again(case: Case, directory: str) -> None:
    """The same where the ranks can agree before the first step."""
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--ssdtrain-dir", directory])
    models.Trainer(case).step(0, get_forward_backward_func(), wrap_forward_step(models.forward_step, args))


def check_alone(folder: Path) -> Any:
    """A single rank raises the error itself, and again in the next step."""
    parallel_state.initialize_model_parallel()
    options = ["--ssdtrain-dir", str(folder / "missing")]
    args = add_arguments(argparse.ArgumentParser()).parse_args(options)
    step = wrap_forward_step(models.forward_step, lambda: args)
    trainer = models.Trainer(Case())
    again = [message_of(lambda i=i: trainer.step(i, get_forward_backward_func(), step)) for i in range(2)]
    conflicting = models.Trainer(Case())
    get_model_config(conflicting.model[0]).cpu_offloading = True
    schedule = offload_schedule(get_forward_backward_func(), str(folder))
    return again + [message_of(lambda i=i: conflicting.step(i, schedule)) for i in range(2)]


def check_conflicts(folder: Path) -> Any:
    """Megatron's own offloading is on."""
    parallel_state.initialize_model_parallel(1, 2)
    messages = []
    for name in ("cpu_offloading", "fine_grained_activation_offloading", "overlap_moe_expert_parallel_comm"):
        trainer = models.Trainer(Case(pp=2))
        setattr(get_model_config(trainer.model[0]), name, True)
        schedule = offload_schedule(get_forward_backward_func(), str(folder))
        messages.append(message_of(lambda t=trainer, s=schedule: t.step(0, s)))
    return messages


def check_schedules(folder: Path) -> Any:
    """A schedule that does not fit, on one rank only; a foreign one; none at all yet; sizes that do not fit."""
    none_yet = message_of(lambda: offload_schedule(schedules.forward_backward_no_pipelining, str(folder)))
    sizes = message_of(lambda: parallel_state.initialize_model_parallel(3))
    parallel_state.initialize_model_parallel(1, 2)
    fitting = get_forward_backward_func()
    given = fitting if torch.distributed.get_rank() == 0 else schedules.forward_backward_no_pipelining
    one_wrong = message_of(lambda: offload_schedule(given, str(folder)))
    return [none_yet, sizes, one_wrong, message_of(lambda: offload_schedule(print, str(folder)))]


def check_emptied(folder: Path) -> Any:
    """What Megatron does behind autograd's back.

    `deallocate_output_tensor` and `custom_backward`, with the record of the output in memory and on the drive; a view
    made viewless, whose storage then has two version counters; a change in place that must be noticed.
    """
    torch.manual_seed(0)
    weight = torch.randn(64, 64, requires_grad=True)
    policy = {"mode": "all", "min_nbytes": 0, "staging_nbytes": 64 * 1024}

    def backward(offload: Any, is_sent: bool, is_viewless: bool) -> torch.Tensor:
        weight.grad = None
        with offload:
            hidden = (weight @ weight).t().sigmoid()
            if is_viewless:
                hidden = make_viewless_tensor(hidden.t(), requires_grad=True, keep_graph=True)
            output = hidden.exp()  # saves its own output, which is then emptied
            if is_sent:
                for size in (510, 510, 510, 16384, 510):
                    torch.zeros(size, requires_grad=True).exp()
                inside.transport(offload).engine.drain()
        grad = torch.ones_like(output)
        schedules.deallocate_output_tensor(output, True)
        assert output.numel() == 1
        schedules.custom_backward(output, grad)
        return weight.grad.clone()

    equal = []
    for is_viewless in (False, True):
        expected = backward(contextlib.nullcontext(), False, is_viewless)
        for is_sent in (False, True):
            with ssdtrain.offload_activations(folder, policy) as offload:
                before = offload.stats.read_nbytes
                equal.append(torch.equal(expected, backward(offload, is_sent, is_viewless)))
                assert (offload.stats.read_nbytes > before) == is_sent
                assert offload.stats.num_live_records == 0
    with ssdtrain.offload_activations(folder, policy):
        output = weight.exp()
        changed = output.add_(1)
    schedules.deallocate_output_tensor(changed, True)
    return [all(equal), message_of(lambda: schedules.custom_backward(changed, torch.ones(64, 64)))]


def check_bridge(folder: Path) -> Any:
    """Megatron-Bridge's events in its order, round steps that recompute outputs which were emptied."""
    parallel_state.initialize_model_parallel()
    case, results = Case(config=SELECTIVE | NO_BIAS), []
    refused = Offload(folder, optimizer=True)
    for callback in (None, Offload(folder, activations=POLICY)):
        trainer = models.Trainer(case)
        context = types.SimpleNamespace(model=trainer.model)
        found = []
        if callback is not None:
            callback.on_train_start(context)
        for i in range(3):
            found += trainer.step(i, get_forward_backward_func())
            assert innermost_hooks() is None
        results.append(found + trainer.weights())
    callback.on_train_end(context)
    stats = callback.session.stats
    is_equal = len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
    get_model_config(trainer.model[0]).cpu_offloading = True
    conflict = message_of(lambda: Offload(folder).on_train_start(context))
    refusal = message_of(lambda: refused.on_train_start(context))
    return [is_equal, stats.read_nbytes, stats.skipped["refilled by its owner"].count, conflict, refusal]


def check_bridge_raises(folder: Path) -> Any:
    """Nothing tells a callback of an error: what is on when one comes, in forward and in backward, and afterwards."""
    parallel_state.initialize_model_parallel()
    trainer = models.Trainer(Case())
    context, seen = types.SimpleNamespace(model=trainer.model), []
    layer = next(m for m in trainer.model[0].modules() if type(m).__name__ == "TransformerLayer")

    def fail(*_: Any) -> None:
        seen.append(innermost_hooks() is not None)
        raise RuntimeError("out of luck")

    def train(callback: Offload, register: Any) -> None:
        callback.on_train_start(context)
        trainer.step(0, get_forward_backward_func())
        with contextlib.closing(types.SimpleNamespace(close=register(fail).remove)):
            assert "out of luck" in message_of(lambda: trainer.step(1, get_forward_backward_func()))
        seen.append(innermost_hooks() is None)

    def is_plain() -> bool:
        return not any("forward" in vars(chunk) for chunk in trainer.model)

    train(Offload(folder, activations=POLICY), layer.register_forward_hook)
    gc.collect()
    seen.append(is_plain())  # the callback is gone, and what it had put there
    with Offload(folder, activations=POLICY) as callback:
        train(callback, layer.register_full_backward_hook)
        seen.append(not is_plain())
    seen += [is_plain(), "closed" in repr(callback.session) or callback.session.stats.num_live_records == 0]
    return seen


_PREFIX = "check_"
CHECKS = {
    name.removeprefix(_PREFIX).replace("_", "-"): check for name, check in globals().items() if name.startswith(_PREFIX)
}


# -- one after the other -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def groups(meeting: Path) -> Iterator[None]:
    """Process groups of one case: a thread of gloo's for each of some twenty wakes up a hundred times a second."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    yield
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    gc.collect()  # models hold groups
    torch.distributed.destroy_process_group()


def run(name: str, folder: Path) -> dict[str, Any]:
    if name in CHECKS:
        return {"result": CHECKS[name](folder)}
    case = (ALONE | PAIR)[name]
    parallel_state.initialize_model_parallel(
        case.tp,
        case.pp,
        virtual_pipeline_model_parallel_size=case.vp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
    )
    return run_case(case, str(folder))


def main() -> None:
    rank, folder = os.environ["RANK"], Path(sys.argv[1])
    torch.set_num_threads(1)
    spill = folder / "spill"
    with cpu.stand_in():
        for name in sys.argv[2:]:
            path = spill / name
            path.mkdir(parents=True, exist_ok=True)
            try:
                with groups(folder / f"meeting.{name}"):
                    result = run(name, path)
            except BaseException:
                result = {"error": traceback.format_exc()}
            (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
            if "error" in result:
                os._exit(1)  # the other rank must not wait for the end of a half-run collective


if __name__ == "__main__":
    main()
