"""Cases of Hugging Face's Trainer, see `test_trainers.py`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from accelerate import FullyShardedDataParallelPlugin, debug_launcher
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainers_tools import (
    ACTIVATIONS,
    EVERYTHING,
    NUM_RANKS,
    NUM_TOKENS,
    PAGED,
    RANK,
    Texts,
    assert_clean,
    assert_equal,
    assert_offloaded,
    llama,
    local,
    own_directory,
    raises,
    refused_alike,
    refused_when_full,
    run_recipe,
    says_that_nothing_moved,
    state_of,
    values,
    warns_of_its_version,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

import ssdtrain
from ssdtrain.integrations.transformers import Offload, use_checkpoint


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """Accumulation, clipping, evaluation and checkpoints in between."""
    usual = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "seed": 7,
    }
    return TrainingArguments(**(usual | more))


def trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, kind: type = Trainer, **more: Any) -> Any:
    optimizers = more.pop("optimizers", (None, None))
    model = llama() if model is None else model
    return kind(
        model=model,
        args=arguments(folder, **more),
        train_dataset=Texts(),
        eval_dataset=Texts(4),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def outcome(trained: Any) -> dict[str, Any]:
    """Losses, norms and rates as logged, and what is left."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate")
    logs = [{name: log[name] for name in names if name in log} for log in trained.state.log_history]
    return {"logs": logs, "values": values(trained.model), "state": state_of(trained.optimizer)}


def compare(folder: Path, callback: Offload, **more: Any) -> None:
    """Trains without and with."""
    plain = trainer(folder / "plain", **copy.deepcopy(more))
    plain.train()
    expected = outcome(plain)
    ours = trainer(folder / "ours", callback, **more)
    ours.train()
    assert_equal(expected, outcome(ours), "trained")
    assert_offloaded(callback.session)
    assert_clean()


def everything(folder: Path) -> None:
    callback = Offload(own_directory(folder), **EVERYTHING)
    compare(folder, callback)
    assert len(callback.session.state_stats) == 2
    callback.session.close()


def checkpointing(folder: Path) -> None:
    """The trainer's own switch; all that a layer is called with is offloaded, not its positional arguments alone."""
    callback = Offload(own_directory(folder), activations=ACTIVATIONS)
    compare(folder, callback, activation_checkpointing=True)

    tokens = Texts()[0]["input_ids"][None].repeat(4, 1)
    stats, gradients = {}, {}
    for is_ours in (False, True):
        model = llama().train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert not is_ours or use_checkpoint(model) > 0 == use_checkpoint(model)
        with ssdtrain.offload_activations(own_directory(folder), ACTIVATIONS | {"min_nbytes": 1}) as offload:
            model(input_ids=tokens, labels=tokens).loss.backward()
        stats[is_ours] = offload.stats
        gradients[is_ours] = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(gradients[False], gradients[True], "gradients")
    assert stats[True].num_saved > stats[False].num_saved, stats  # cosines and sines of every layer


def directory_of_a_rank(folder: Path) -> None:
    own_directory(folder)
    compare(folder, Offload(f"{folder}/rank{{rank}}", activations=ACTIVATIONS))


def resumed_both_ways(folder: Path) -> None:
    """A checkpoint of either goes on with either; one of six is where a step is over."""
    more = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    plain = trainer(folder / "plain", **more)
    plain.train()
    expected = outcome(plain)
    first = Offload(own_directory(folder), **EVERYTHING)
    trainer(folder / "ours", first, **more).train()
    for start, callback in (("plain", Offload(own_directory(folder), **EVERYTHING)), ("ours", None), ("ours", first)):
        resumed = trainer(folder / "resumed", *([callback] if callback else []), **more)
        resumed.train(resume_from_checkpoint=str(folder / start / "checkpoint-2"))
        found = outcome(resumed)
        assert_equal(expected["logs"][2:4], found["logs"][2:4], f"logs from {start}")
        assert_equal(expected["values"], found["values"], f"values from {start}")
        assert_equal(expected["state"], found["state"], f"state from {start}")
        if callback:
            assert_offloaded(callback.session)


class Failing(Trainer):
    """Raises once, at a place."""

    where = ""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self._due("forward"):
            raise KeyboardInterrupt
        found = super().compute_loss(*args, **kwargs)
        if self._due("backward"):
            found.register_hook(_raise)
        if self._due("loss"):
            raise ValueError("loss")
        return found

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._due("clipping"):
            raise ValueError("clipping")
        return super()._clip_grad_norm(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._due("evaluation"):
            raise ValueError("evaluation")
        return super().evaluate(*args, **kwargs)

    def _due(self, place: str) -> bool:
        if self.where != place or self.state.global_step < 1:
            return False
        self.where = ""
        return True


def _raise(*_: object) -> None:
    raise ValueError("backward")


def raised_anywhere(folder: Path) -> None:
    """Nothing is left on, and the same trainer trains again as without."""
    plain = trainer(folder / "plain")
    plain.train()
    start = values(llama())
    callback = Offload(own_directory(folder), **EVERYTHING)
    for where in ("forward", "loss", "backward", "clipping", "evaluation"):
        ours = trainer(folder / where, callback, kind=Failing)
        ours.where = where
        with raises(BaseException):
            ours.train()
        callback.session.close()
    ours = trainer(folder / "again", callback)
    assert_equal(start, values(ours.model), "model")
    ours.train()
    assert_equal(outcome(plain), outcome(ours), "trained after all")


def trained_twice(folder: Path) -> None:
    """Evaluated before and between, with one trainer and one callback."""
    callback, found = Offload(own_directory(folder), **EVERYTHING), []
    for callbacks in ([], [callback]):
        own = trainer(folder, *callbacks)
        outcomes = []
        for _ in range(2):
            own.evaluate()
            own.train()
            assert_clean()
            outcomes.append(outcome(own))
        found.append(outcomes)
    assert_equal(*found, "trained")
    assert_offloaded(callback.session)


class Short(Trainer):
    """Has no memory for more than one row in its fourth micro-batch."""

    num_batches = 0

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 1:
            self.num_batches += 1
            if self.num_batches == 4:
                raise RuntimeError("CUDA out of memory.")
        return loss


def batch_size_that_fits(folder: Path) -> None:
    """`auto_find_batch_size` begins anew in the middle, with smaller batches."""
    compare(folder, Offload(own_directory(folder), **EVERYTHING), kind=Short, auto_find_batch_size=True)


def compiled(folder: Path) -> None:
    """`torch_compile`, without a code generator; the trainer says so in the environment, where others would find it."""
    callback = Offload(own_directory(folder), activations=ACTIVATIONS, optimizer=PAGED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        compare(folder, callback, torch_compile=True, torch_compile_backend="eager")


def gradients_away(folder: Path) -> None:
    """Clipping by default, which reads all gradients."""
    optimizer = PAGED | {"offload_gradients": True}
    compare(folder, Offload(folder, activations=False, optimizer=optimizer))


def step_in_backward(folder: Path) -> None:
    """Two backwards a step, of which the second one updates; the norm is logged although nothing is clipped."""
    optimizer = PAGED | {"step_in_backward": True}
    compare(folder, Offload(folder, activations=ACTIVATIONS, optimizer=optimizer), max_grad_norm=0.0)
    with raises(ValueError, "Expected max_grad_norm=0 with step_in_backward", "use offload_gradients"):
        trainer(folder, Offload(folder, optimizer=optimizer)).train()


def not_with_replicas(folder: Path) -> None:
    for mode in ("step_in_backward", "offload_gradients"):
        callback = Offload(folder, optimizer=PAGED | {mode: True})
        with raises(ValueError, f"Expected {mode}=False in a job of several processes"):
            trainer(folder, callback, max_grad_norm=0.0).train()


def lora(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def model() -> Any:
        torch.manual_seed(1)
        return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))

    plain = trainer(folder / "plain", model=model())
    plain.train()
    small = {"min_nbytes": 0, "chunk_nbytes": "1KiB"}
    callback = Offload(own_directory(folder), **(EVERYTHING | {"optimizer": small}))
    ours = trainer(folder / "ours", callback, model=model())
    ours.train()
    assert_equal(outcome(plain), outcome(ours), "trained")
    assert_offloaded(callback.session)


def other_offloaders(folder: Path) -> None:
    kwargs = {"use_reentrant": False, "offload": True}
    more = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
    by_its_old_name = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    for own in (more, by_its_old_name):
        with raises(ValueError, "one that offloads activations", "turn 'offload' off"):
            trainer(folder, Offload(folder), **own).train()
    of_unsloth = type("UnslothCheckpointFunction", (torch_checkpoint.CheckpointFunction,), {})
    with pytest.MonkeyPatch.context() as patch, raises(ValueError, "use_gradient_checkpointing=True instead of 'uns"):
        patch.setattr(torch_checkpoint, "CheckpointFunction", of_unsloth)
        trainer(folder, Offload(folder), activation_checkpointing=True).train()
    compare(folder, Offload(own_directory(folder), **EVERYTHING), activation_checkpointing=True)


def refused_on_every_rank(folder: Path) -> None:
    """Before training, with the model and optimizer as they were; nobody waits."""
    start = values(llama())
    missing = folder / "missing" if RANK == NUM_RANKS - 1 else folder
    ours = trainer(folder, Offload(missing, **EVERYTHING))
    with raises(Exception, "missing"):
        ours.train()
    assert_equal(start, values(ours.model), "model")
    for callback in list(ours.callback_handler.callbacks):
        ours.remove_callback(callback) if isinstance(callback, Offload) else None
    ours.train()
    plain = trainer(folder)
    plain.train()
    assert_equal(outcome(plain), outcome(ours), "trained without")

    with raises(ValueError, "Expected one ssdtrain callback, got 2"):
        trainer(folder, Offload(folder), Offload(folder)).train()
    model = llama()
    optimizer = torch.optim.LBFGS(model.parameters())
    with raises(ValueError, "Expected an optimizer whose step needs no closure, got LBFGS"):
        trainer(folder, Offload(folder, **EVERYTHING), model=model, optimizers=(optimizer, None)).train()
    assert_equal(start, values(model), "model")


def begin(folder: Path, model: Any, kind: Any, directory: Any, **features: Any) -> None:
    callback, optimizer = Offload(directory, **features), kind(model.parameters())
    trainer(folder, callback, model=model, optimizers=(optimizer, None)).train()


def bad_input(folder: Path) -> None:
    """Each is said before training, on every rank."""
    refused_alike(folder, llama, begin)


def full_disk(folder: Path) -> None:
    refused_when_full(folder, llama, begin)


def nothing_moved(folder: Path) -> None:
    says_that_nothing_moved(folder, lambda _, directory: trainer(folder, Offload(directory)).train())


def unknown_version(folder: Path) -> None:
    warns_of_its_version(sys.modules["ssdtrain.integrations.transformers"])


def parameters_before_replicas(folder: Path) -> None:
    """They are away when DistributedDataParallel is made; the state follows in the trainer."""
    plain = trainer(folder / "plain")
    plain.train()
    model = ssdtrain.offload_parameters(llama(), own_directory(folder), EVERYTHING["parameters"])
    callback = Offload(own_directory(folder), activations=ACTIVATIONS, optimizer=PAGED)
    ours = trainer(folder / "ours", callback, model=model)
    ours.train()
    assert ssdtrain.parameter_offload(model).stats.read_nbytes
    assert_equal(outcome(plain), outcome(ours), "trained")
    assert_offloaded(callback.session)


def forked_workers(folder: Path) -> None:
    """As a notebook's launcher starts them; also with a callback that this process has trained with before."""
    used, held = Offload(own_directory(folder), activations=ACTIVATIONS), Offload(own_directory(folder), **EVERYTHING)
    for callback in (used, held):
        trainer(folder, callback).train()
    debug_launcher(_in_a_worker, (folder, used, held), num_processes=2)


def _in_a_worker(folder: Path, used: Offload, held: Offload) -> None:
    plain = trainer(folder / "plain")
    plain.train()
    for callback in (used, Offload(folder, **EVERYTHING)):
        ours = trainer(folder / "ours", callback)
        ours.train()
        assert_equal(outcome(plain), outcome(ours), "trained in a worker")
        assert_offloaded(callback.session)
    with raises(RuntimeError, "Expected the process that offloaded, got a forked child"):
        trainer(folder / "held", held).train()  # whose parameters and state are in the other process


class Sharded(Trainer):
    """By FSDP2 as its arguments say, which Accelerate leaves aside without a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state, plugin = self.accelerator.state, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        plugin.cpu_offload = None
        state.distributed_type, state.fsdp_plugin, self.is_fsdp_enabled = DistributedType.FSDP, plugin, True


def sharded(folder: Path) -> None:
    """State of DTensors. FSDP2's own offloading, which its variable asks for, is refused; its checkpoints are not."""
    config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "activation_checkpointing": True}
    more = {"kind": Sharded, "fsdp": True, "fsdp_config": config}
    with pytest.MonkeyPatch.context() as patch, raises(ValueError, "turn activation_checkpointing_offload of the FSDP"):
        patch.setenv("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true")
        trainer(folder, Offload(own_directory(folder)), **more).train()
    callback = Offload(own_directory(folder), activations=ACTIVATIONS, optimizer=PAGED | {"chunk_nbytes": "16KiB"})
    found = []
    for callbacks in ([], [callback]):
        own = trainer(folder, *callbacks, **copy.deepcopy(more))
        own.train()
        assert all(isinstance(p, DTensor) for p in own.model.model.layers.parameters())
        found.append(local(outcome(own)))
    assert_equal(*found, "trained")
    assert_offloaded(callback.session)


def threads_of_dataparallel(folder: Path) -> None:
    ours = trainer(folder, Offload(folder))
    callback = next(c for c in ours.callback_handler.callbacks if isinstance(c, Offload))
    ours.args._n_gpu = 2
    with raises(ValueError, "got DataParallel on 2 GPUs", "torchrun"):
        callback.on_train_begin(ours.args, ours.state, ours.control, model=ours.model, optimizer=None)


def axolotl_plugin(folder: Path) -> None:
    """With axolotl itself where it can be imported, else with a stand-in of the seam it has."""
    if importlib.util.find_spec("axolotl") is None:
        stand_in("axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    from ssdtrain.integrations.axolotl import SsdtrainPlugin

    plugin = SsdtrainPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    own = {"directory": str(folder), **EVERYTHING}
    assert schema(ssdtrain=own).ssdtrain == own
    with raises(ValueError, "got 'optimiser'. Did you mean 'optimizer'?"):
        schema(ssdtrain={"directory": str(folder), "optimiser": True})
    assert plugin.add_callbacks_post_trainer({}, None) == []
    with raises(ValueError, "activation_offloading='disk' beside ssdtrain: remove that key"):
        plugin.add_callbacks_post_trainer({"ssdtrain": own, "activation_offloading": "disk"}, None)
    (callback,) = plugin.add_callbacks_post_trainer({"ssdtrain": own}, None)
    compare(folder, callback)


def swift_callback(folder: Path) -> None:
    """The same with ms-swift."""
    if importlib.util.find_spec("swift") is None:
        stand_in("swift.callbacks.mapping", callbacks_map={})
    importlib.import_module("ssdtrain.integrations.swift")
    made = importlib.import_module("swift.callbacks.mapping").callbacks_map["ssdtrain"]
    os.environ["SSDTRAIN_CONFIG"] = str(folder / "own.json")
    (folder / "own.json").write_text(json.dumps({"directory": str(folder), **EVERYTHING}))
    with raises(ValueError, "got both"):
        made(types.SimpleNamespace(callbacks=["ssdtrain", "activation_cpu_offload"]), None)
    compare(folder, made(types.SimpleNamespace(callbacks=["ssdtrain"]), None))
    del os.environ["SSDTRAIN_CONFIG"]


def recipe(folder: Path) -> None:
    """Equal to the bit, and all of it is offloaded."""
    losses = []
    for more in ([], ["--no-offload"]):
        losses.append(
            run_recipe("transformers", "--dir", str(folder), "--steps", "2", "--width", "64", "--length", "128", *more)
        )
    assert losses[0].splitlines()[-2:] != losses[1].splitlines()[-2:]
    assert [line for line in losses[0].splitlines() if line.startswith("loss")] == losses[1].splitlines()[-1:]


def long_context(folder: Path) -> None:
    """All its methods come to the same losses, and inputs of checkpoints are offloaded."""
    size = "--length 96 --steps 2 --layers 3 --width 64 --chunk 32 --min-nbytes 2KiB --staging-nbytes 256KiB".split()
    found = {}
    for method in ("plain", "checkpointing", "checkpointing with ssdtrain", "ssdtrain, recompute auto"):
        own = [str(folder), "--method", method, "--budget", "1MiB", *size]
        found[method] = json.loads(run_recipe("transformers", *own, name="long_context.py").splitlines()[-1])
        assert found[method]["losses"] == found["plain"]["losses"], found
    inputs = found["checkpointing with ssdtrain"]
    assert inputs["written_nbytes"] >= 2 * 3 * 96 * 64 * 4 and inputs["fallbacks"] == [], inputs


def stand_in(name: str, **attributes: Any) -> None:
    """Puts a module where a package would be; the version is one that is tested."""
    parts = name.split(".")
    for i in range(len(parts)):
        module = types.ModuleType(".".join(parts[: i + 1]))
        module.__path__ = []
        sys.modules[module.__name__] = module
    vars(module).update(attributes)
    from ssdtrain import integrations

    tested = {"axolotl": "axolotl", "swift": "ms-swift"}[parts[0]]
    original = integrations.version
    integrations.version = lambda package: (
        integrations.TESTED_VERSIONS[package][0] if package == tested else original(package)
    )


def sft(folder: Path, *callbacks: Any, **more: Any) -> Any:
    """What TRL's own trainer comes to, with LoRA."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    config = SFTConfig(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="no",
        bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **more,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": Texts().tokens.tolist(), "labels": Texts().tokens.tolist()})
    own = SFTTrainer(
        llama(), config, train_dataset=rows, processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), callbacks=list(callbacks),
    )  # fmt: skip
    own.train()
    return outcome(own)


def trl_sft_with_lora(folder: Path) -> None:
    """Its own offloading is refused."""
    refused = raises(ValueError, "got activation_offloading=True beside ssdtrain: turn activation_offloading off")
    with pytest.MonkeyPatch.context() as patch, refused:
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))  # which TRL asks for
        sft(folder, Offload(own_directory(folder)), activation_offloading=True)
    small = {"min_nbytes": 0, "chunk_nbytes": "1KiB"}
    callback = Offload(own_directory(folder), **(EVERYTHING | {"optimizer": small}))
    assert_equal(sft(folder), sft(folder, callback), "trained")
    assert_offloaded(callback.session)


def trl_own_switch(folder: Path) -> None:
    """TRL's `activation_offloading=True` with our class in the place of its own."""
    from trl.models import activation_offloading as theirs

    from ssdtrain.api.peers import OffloadActivations

    made: list[OffloadActivations] = []

    def make(**options: Any) -> OffloadActivations:
        policy = {name: ACTIVATIONS[name] for name in ("staging_nbytes", "prefetch_nbytes")}
        made.append(OffloadActivations(directory=own_directory(folder), policy=policy, **options))
        return made[-1]

    expected, own = sft(folder), theirs.OffloadActivations
    theirs.OffloadActivations = make
    try:
        assert_equal(expected, sft(folder, activation_offloading=True), "trained")
    finally:
        theirs.OffloadActivations = own
    (offload,) = made
    assert offload.stats.num_offloaded > 0, offload.stats
    offload.close()


def tokenizer() -> Any:
    """One that knows its tokens by number."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(NUM_TOKENS)}
    own = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="t0", eos_token="t1", unk_token="t0")
