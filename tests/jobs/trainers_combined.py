"""Cases that combine much of a trainer at once, see `test_trainers.py`: to the bit as without ssdtrain."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import trainers_accelerate
import trainers_hf
import trainers_lightning
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from trainers_tools import (
    EVERYTHING,
    NUM_TOKENS,
    STATE,
    assert_clean,
    assert_equal,
    assert_offloaded,
    llama,
    own_directory,
    state_of,
    values,
)

from ssdtrain.integrations.lightning import Offload as LightningOffload
from ssdtrain.integrations.transformers import Offload

_SMALL_CHUNKS = EVERYTHING | {"optimizer": STATE | {"min_nbytes": 0, "chunk_nbytes": "1KiB"}}


def packed_lora_resumed(folder: Path) -> None:
    """TRL: packing, LoRA, accumulation, evaluation, a checkpoint in between; each is resumed with and without ours."""
    first = {}
    for name in ("plain", "ours"):
        callbacks = [Offload(own_directory(folder), **_SMALL_CHUNKS)] if name == "ours" else []
        first[name] = _packed(folder / name, callbacks)
    assert_equal(first["plain"], first["ours"], "trained")
    for start in ("plain", "ours"):
        checkpoint = str(next((folder / start).glob("checkpoint-2")))
        for is_ours in (False, True):
            callbacks = [Offload(own_directory(folder), **_SMALL_CHUNKS)] if is_ours else []
            resumed = _packed(folder / f"{start}{is_ours}", callbacks, resume_from_checkpoint=checkpoint)
            assert_equal(first["plain"]["values"], resumed["values"], f"from {start}, with ours: {is_ours}")
            assert_equal(first["plain"]["state"], resumed["state"], f"from {start}, with ours: {is_ours}")


def _packed(folder: Path, callbacks: list[Any], **how: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 30, (48,), generator=generator).tolist()
    rows = [torch.randint(2, NUM_TOKENS, (n,), generator=generator).tolist() for n in lengths]
    data = Dataset.from_list([{"input_ids": row} for row in rows])
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        packing=True,
        max_length=32,
        padding_free=False,
        eval_packing=False,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        seed=7,
    )
    trainer = SFTTrainer(
        model=llama(),
        args=config,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=trainers_hf.tokenizer(),
        peft_config=LoraConfig(r=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
        callbacks=callbacks,
    )
    trainer.train(**how)
    assert_clean()
    for callback in callbacks:
        assert_offloaded(callback.session)
    return trainers_hf.outcome(trainer)


class _Adversaries(trainers_lightning.Module):
    """Two optimizers by hand, each for its own block; gradients of the second flow through the first."""

    automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = self(batch[0]).square().mean()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        other = (self(batch[0].detach()) - 1).square().mean()
        self.manual_backward(other / 2)
        if index % 2:  # accumulates over two batches
            second.step()
            second.zero_grad()
        self.untoggle_optimizer(second)
        self.losses += [loss.detach().clone(), other.detach().clone()]

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW([*self.h[0].parameters(), *self.h[1].parameters()], lr=1e-2)
        return [first, torch.optim.Adam(self.h[2].parameters(), lr=2e-2)]


def by_hand_with_two_optimizers(folder: Path) -> None:
    found = []
    for callbacks in ([], [LightningOffload(own_directory(folder), **EVERYTHING)]):
        module, more = _Adversaries(), {"accumulate_grad_batches": 1, "gradient_clip_val": None}
        trainer = trainers_lightning.trainer(folder, *callbacks, **more)
        trainer.fit(module, trainers_lightning.loader(), trainers_lightning.loader(8))
        found.append([module.losses, values(module), [state_of(each)["state"] for each in trainer.optimizers]])
        assert_clean()
    assert_equal(*found, "trained")
    assert_offloaded(callbacks[0].session)


def goes_on_after_an_error(folder: Path) -> None:
    """Accelerate: a micro-batch fails, in forward, in backward and before the step; its gradients are dropped."""
    found = []
    for directory in (None, own_directory(folder)):
        run = trainers_accelerate.Run(directory, **(EVERYTHING if directory else {}))
        found.append([_with_errors(run), *run.train()])
    assert_equal(*found, "trained")
    assert_offloaded(run.accelerator.ssdtrain)


def _with_errors(run: trainers_accelerate.Run) -> list[torch.Tensor]:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    layers, losses = run.accelerator.unwrap_model(run.model).model.layers, []
    places = {1: layers[1].register_forward_hook, 3: layers[1].register_full_backward_hook}
    for step, batch in enumerate(run.loader):
        handle = places[step](fail) if step in places else None
        try:
            with run.accelerator.accumulate(run.model):
                loss = run.model(**batch).loss
                run.accelerator.backward(loss)
                if step == 5:
                    fail()
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad()
            losses.append(loss.detach().clone())
        except RuntimeError as error:
            if "out of luck" not in str(error):
                raise
            run.optimizer.zero_grad()
        finally:
            if handle is not None:
                handle.remove()
        assert_clean()
    return losses


def best_at_the_end(folder: Path) -> None:
    """The Trainer loads the best checkpoint, which is not the last, into parameters that are away; with noise, too."""
    more = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "greater_is_better": True}
    more |= {"metric_for_best_model": "eval_loss", "neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1}
    trainers_hf.compare(folder, Offload(own_directory(folder), **EVERYTHING), **more)


def averaged_weights(folder: Path) -> None:
    """Lightning's callbacks average weights that are away, validate with the averages, and leave these behind."""
    averages = [partial(EMAWeightAveraging, decay=0.9), partial(StochasticWeightAveraging, 1e-3, swa_epoch_start=1)]
    for average in averages:
        found = []
        for callbacks in ([], [LightningOffload(own_directory(folder), **EVERYTHING)]):
            module = trainers_lightning.Module()
            trainer = trainers_lightning.trainer(folder, *callbacks, average(), max_epochs=3)
            trainer.fit(module, trainers_lightning.loader(), trainers_lightning.loader(8))
            found.append([module.losses, values(module)])
            assert_clean()
        assert_equal(*found, str(average))
        assert_offloaded(callbacks[0].session)
