"""A few optimizer steps of a small GPT in any layout, on the same tokens; run inside the ranks."""

import deepspeed
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import nn

from gqa_parallel.attention.shared_parameters import shared_parameters
from gqa_parallel.deepspeed.config import deepspeed_config
from gqa_parallel.deepspeed.engine import deepspeed_engine
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.model import build_gpt, weight_decay_groups

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
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
    }
    return GQATransformerConfig(**{**defaults, **settings})


def build_model(config: GQATransformerConfig, seed: int = 5, tie_embeddings: bool = True):
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=parallel_state.get_tensor_model_parallel_rank(), ep_rank=0, etp_rank=0
    )
    return build_gpt(
        config,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        tie_embeddings=tie_embeddings,
        rope_theta=1000.0,
    )


def tokens_of(step: int) -> torch.Tensor:
    """The global batch of a step, [GLOBAL_BATCH, SEQUENCE + 1]: a noisy counting sequence, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (GLOBAL_BATCH, 1), generator=generator)
    noise = torch.randint(3, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    return (start + torch.arange(SEQUENCE + 1) * 2 + noise) % VOCAB


def train(
    stage: int, steps: int, settings: dict | None = None, precision: str = "fp32", tie_embeddings: bool = True
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
    model = build_model(small_config(**settings), tie_embeddings=tie_embeddings)
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
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
        torch.distributed.all_reduce(total, group=dp_group)
        losses.append(total.item() / dp_size)
        norms.append(float(engine.get_global_grad_norm()))
    differing = differing_copies(engine)
    engine.destroy()
    return {"losses": losses, "norms": norms, "differing": differing}


def differing_copies(engine) -> list[str]:
    names = []
    tp_group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter, group in shared_parameters(engine.module, tp_group):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            copies = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(copies, parameter.detach().contiguous(), group=group)
        if any(not torch.equal(copy, copies[0]) for copy in copies):
            names.append(name)
    return names
