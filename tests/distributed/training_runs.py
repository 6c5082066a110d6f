"""A few optimizer steps of a small GPT in any layout, on the same tokens; run inside the ranks."""

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import nn

from gqa_parallel.attention.rope import Rope
from gqa_parallel.attention.shared_parameters import share
from gqa_parallel.deepspeed.config import deepspeed_config
from gqa_parallel.deepspeed.copies import differing_copies
from gqa_parallel.deepspeed.engine import deepspeed_engine
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.model import build_gpt, weight_decay_groups
from gqa_parallel.megatron.process_groups import kv_replica_group
from gqa_parallel.megatron.variant import GPTVariant
from gqa_parallel.partition.heads import HeadPartition

VOCAB, SEQUENCE, GLOBAL_BATCH, MICRO_BATCH = 48, 12, 8, 2


def small_config(**settings) -> GQATransformerConfig:
    defaults = {
        "num_layers": 2,
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 6,
        "ffn_hidden_size": 24,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.2,
        "rope": Rope(theta=1000.0),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
    }
    return GQATransformerConfig(**{**defaults, **settings})


def build_model(
    config: GQATransformerConfig, seed: int = 5, tie_embeddings: bool = True, variant: GPTVariant | None = None
):
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=parallel_state.get_tensor_model_parallel_rank(), ep_rank=0, etp_rank=0
    )
    return build_gpt(
        config,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        tie_embeddings=tie_embeddings,
        variant=variant,
    )


def tokens_of(step: int) -> torch.Tensor:
    """The global batch of a step, [GLOBAL_BATCH, SEQUENCE + 1]: a noisy count, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (GLOBAL_BATCH, 1), generator=generator)
    noise = torch.randint(3, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    return (start + torch.arange(SEQUENCE + 1) * 2 + noise) % VOCAB


def train(
    stage: int,
    steps: int,
    settings: dict | None = None,
    precision: str = "fp32",
    tie_embeddings: bool = True,
    variant: GPTVariant | None = None,
) -> dict:
    """
    Returns:
        ``losses`` (mean over the global batch), ``norms``, and ``differing``: shared parameters whose copies are not
        bit-equal afterwards.
    """
    settings = dict(settings or {})
    if precision == "bf16":
        settings |= {"bf16": True, "params_dtype": torch.bfloat16}
    dp_group = parallel_state.get_data_parallel_group()
    dp_rank, dp_size = dp_group.rank(), dp_group.size()
    model = build_model(small_config(**settings), tie_embeddings=tie_embeddings, variant=variant)
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    micro_batches = GLOBAL_BATCH // (MICRO_BATCH * dp_size)
    engine = deepspeed_engine(
        model,
        deepspeed_config(
            stage=stage,
            precision=precision,
            micro_batch_size=MICRO_BATCH,
            micro_batches_per_step=micro_batches,
            dp_size=dp_size,
            clip_grad_norm=0.5,
        ),
        optimizer=optimizer,
    )
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    losses, norms = [], []
    for step in range(steps):
        mine = tokens_of(step).chunk(dp_size)[dp_rank].split(MICRO_BATCH)
        total = torch.zeros(())
        for tokens in mine:
            loss = engine(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / len(mine)
        dist.all_reduce(total, group=dp_group)
        losses.append(total.item() / dp_size)
        norms.append(float(engine.get_global_grad_norm()))
    differing = differing_copies(engine)
    engine.destroy()
    return {"losses": losses, "norms": norms, "differing": differing}


class KnownGradients(nn.Module):
    """A parameter of each kind; in truth every element has gradient 1/4.

    A shared one gets 1/32 from each copy but the first, and from that the rest.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        tp_group = parallel_state.get_tensor_model_parallel_group()
        replicas = kv_replica_group(HeadPartition(4, 2, tp_group.size()), tp_group)
        kv_sharers = replicas if replicas.size() > 1 else None
        self.gradient: dict[str, float] = {}
        self.whole_size = 0

        def add(name: str, size: int, group: dist.ProcessGroup | None = None, sharded: bool = False) -> None:
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.zeros(size, dtype=dtype))
            holder.weight.tensor_model_parallel = sharded
            if group is not None:
                share(holder, group)
            partial = group is not None and group.size() > 1
            self.register_parameter(name, holder.weight)
            self.gradient[name] = (1 / 32 if group.rank() else (9 - group.size()) / 32) if partial else 1 / 4

        add("projection", 15, sharded=True)
        add("kv_projection", 7, kv_sharers, sharded=True)
        add("qk_norm", 3, tp_group)
        add("output_bias", 11)  # its whole gradient appears on every rank
        kv_heads = 2 if tp_group.size() > 1 else 1
        self.whole_size = 15 * tp_group.size() + 7 * kv_heads + 3 + 11

    def forward(self) -> torch.Tensor:
        return sum((getattr(self, name) * gradient).sum() for name, gradient in self.gradient.items())


def norm_and_step_of_known_gradients(stage: int, precision: str) -> dict:
    """One step of plain SGD, learning rate 1, on ``KnownGradients``, clipped to norm 1/2.

    Returns:
        The reported norm, the number of elements of the whole model, and every weight after the step.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = KnownGradients(dtype)
    config = deepspeed_config(
        stage=stage,
        precision=precision,
        micro_batch_size=1,
        micro_batches_per_step=1,
        dp_size=parallel_state.get_data_parallel_world_size(),
        clip_grad_norm=0.5,
    )
    config["zero_allow_untested_optimizer"] = True
    engine = deepspeed_engine(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    engine.backward(engine())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        weights = torch.cat([parameter.detach().float() for parameter in engine.module.parameters()]).tolist()
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return {"norm": norm, "whole_size": model.whole_size, "weights": weights}


def engine_refusal(config: dict) -> str:
    try:
        deepspeed_engine(nn.Linear(1, 1), config)
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")
