"""Small models and training loops on the real megatron-core, for child processes that stand in for `torch.cuda`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from ssdtrain.tools.demo.saved_counter import SavedTensorCounter

VOCABULARY, SEQUENCE, BATCH = 256, 128, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of training."""

    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    ep: int = 1
    num_layers: int = 6
    hidden: int = 128
    is_plain: bool = False  # torch's optimizer and no DDP, else Megatron's
    has_distributed_optimizer: bool = False
    is_megatron_lm: bool = False  # the forward step is wrapped, as for Megatron-LM's loop, else the schedule
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_microbatches(self) -> int:
        return 4 if self.pp > 1 else 2


class Kept(SavedTensorCounter):
    """Counts without keeping the graph alive that an operator's own output hangs on."""

    def _pack(self, tensor: torch.Tensor) -> Any:
        return super()._pack(tensor.detach())


class Norm(torch.nn.Module):
    """RMS norm that sequence parallelism takes: torch's own is refused there, the fused ones need CUDA."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatheringAttention(torch.nn.Module):
    """Causal attention for context parallelism: gathers keys and values. Megatron's own needs TransformerEngine."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.group = parallel_state.get_context_parallel_group()

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> torch.Tensor:
        from torch.distributed.nn.functional import all_gather

        keys, values = (torch.cat(all_gather(t.contiguous(), group=self.group)) for t in (key, value))
        first = self.group.rank() * query.shape[0]
        mask = torch.arange(first, first + query.shape[0])[:, None] >= torch.arange(keys.shape[0])[None]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def make_config(case: Case) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": case.num_layers,
        "hidden_size": case.hidden,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vp,
        "context_parallel_size": case.cp,
        "expert_model_parallel_size": case.ep,
        "pipeline_dtype": torch.float32,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "deallocate_pipeline_outputs": True,
        "deterministic_mode": False,
    }
    return TransformerConfig(**options | case.config)


def make_chunk(case: Case, config: TransformerConfig, vp_stage: int | None) -> torch.nn.Module:
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization="RMSNorm",
        multi_latent_attention=config.multi_latent_attention,
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    if case.cp > 1:
        spec.submodules.self_attention.submodules.core_attention = GatheringAttention
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    block = TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=Norm)
    return GPTModel(
        config,
        block,
        VOCABULARY,
        SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )


def make_model(case: Case) -> list[torch.nn.Module]:
    torch.manual_seed(1234 + parallel_state.get_pipeline_model_parallel_rank())
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    stages = [None] if case.vp is None else list(range(case.vp))
    model = []
    for stage in stages:
        config = make_config(case)
        chunk = make_chunk(case, config, stage)
        if not case.is_plain:
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=case.has_distributed_optimizer)
            chunk = Float16Module(config, chunk) if config.bf16 else chunk
            chunk = DistributedDataParallel(config, ddp, chunk, disable_bucketing=stage not in (None, 0))
        model.append(chunk)
    return model


def batches(step: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The micro-batches of one step, the same in every run; each data-parallel rank has its own."""
    seed = 1000 * step + parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(SEQUENCE)[None].expand(BATCH, -1)
    while True:
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
        parts = (tokens[:, :-1], tokens[:, 1:], positions)
        size = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        yield tuple(part.chunk(size, dim=1)[rank].contiguous() for part in parts)


MASK = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens, targets, positions = next(data_iterator)
    losses = model(tokens, positions, MASK, labels=targets)
    return losses, loss_function


def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().square().mean()
    return loss, {"loss": loss.detach().clone()}


class Trainer:
    """One model and its optimizer."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = make_model(case)
        self.parameters = [p for chunk in self.model for p in chunk.parameters()]
        if case.is_plain:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, foreach=False)
        else:
            from megatron.core.utils import get_model_config

            config = get_model_config(self.model[0])
            config.finalize_model_grads_func = partial(finalize_model_grads)
            options = OptimizerConfig(
                optimizer="adam",
                lr=1e-3,
                clip_grad=1.0,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=case.has_distributed_optimizer,
            )
            self.optimizer = get_megatron_optimizer(options, self.model)

    def step(self, number: int, schedule: Callable[..., Any], step_func: Any = forward_step) -> list[torch.Tensor]:
        """One optimizer step: losses of the micro-batches (last stage only), and gradients."""
        if self.case.is_plain:
            self.optimizer.zero_grad()
        else:
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        data = [batches(number) for _ in self.model]
        losses = schedule(
            forward_step_func=step_func,
            data_iterator=data if self.case.vp else data[0],
            model=self.model if self.case.vp else self.model[0],
            num_microbatches=self.case.num_microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
        grads = [(p.grad if self.case.is_plain else p.main_grad).clone() for p in self.parameters]
        self.optimizer.step()
        return [entry["loss"] for entry in losses] + grads

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters]
