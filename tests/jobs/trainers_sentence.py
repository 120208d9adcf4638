"""Cases of sentence-transformers, see `test_trainers.py`: its cached losses save what they save inside backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import models as modules
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from trainers_tools import ACTIVATIONS, EVERYTHING, assert_clean, assert_equal, assert_offloaded, own_directory, values
from transformers import BertConfig, BertModel, BertTokenizerFast

import ssdtrain
from ssdtrain.integrations.transformers import Offload

WORDS = [f"w{i}" for i in range(60)]


def bert(folder: Path) -> SentenceTransformer:
    """Two layers with dropout, whose draws the second forward has to repeat, and words for it."""
    path = folder / "bert"
    path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=65, max_position_embeddings=32, **size)).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    body = modules.Transformer(str(path), max_seq_length=16)
    return SentenceTransformer(modules=[body, modules.Pooling(64)], device="cpu")


def pairs(num: int) -> dict[str, list[str]]:
    """Anchors and what is near them."""
    starts = [3 * i % 40 for i in range(num)]
    return {
        "anchor": [" ".join(WORDS[s : s + 8]) for s in starts],
        "positive": [" ".join(WORDS[s + 4 : s + 14]) for s in starts],
    }


def cached_loss(folder: Path) -> None:
    """In a plain loop: nearly all there is, is saved inside backward, and offloaded."""
    model = bert(folder)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    features = [model.preprocess(texts) for texts in pairs(16).values()]
    found: list[Any] = []
    for offload in (None, ssdtrain.offload_activations(own_directory(folder), ACTIVATIONS)):
        torch.manual_seed(1)
        model.zero_grad()
        copies = [dict(each) for each in features]
        if offload is None:
            value = loss(copies, None)
            value.backward()
        else:
            with offload:
                value = loss(copies, None)
                before = offload.stats.num_offloaded
                value.backward()
            stats = offload.stats
            assert stats.num_offloaded - before > 100 > before, stats
            assert stats.read_nbytes and not stats.num_live_records, stats
            assert "saved during backward" not in stats.skipped, stats.skipped
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert_equal(*found, "gradients")


def trained(folder: Path, *callbacks: Any) -> Any:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=7,
    )
    model = bert(folder)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(pairs(48)),
        loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
        callbacks=list(callbacks),
    )
    trainer.train()
    logs = [{name: log[name] for name in ("loss", "grad_norm") if name in log} for log in trainer.state.log_history]
    return logs, values(model)


def everything(folder: Path) -> None:
    """Its own trainer, with clipping, accumulation and the state on the drive."""
    features = {name: EVERYTHING[name] for name in ("activations", "optimizer")}
    callback = Offload(own_directory(folder), **features)
    assert_equal(trained(folder), trained(folder, callback), "trained")
    assert_offloaded(callback.session)
    stats = callback.session.stats
    assert stats is not None and "saved during backward" not in stats.skipped, stats
    assert_clean()
    callback.session.close()
