"""Megatron-Core's ``GPTModel`` with grouped-query attention."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import nn

from gqa_parallel.megatron.layer_spec import gqa_block_spec


def build_gpt(
    config: TransformerConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    tie_embeddings: bool,
    rope_theta: float,
    rope_scaling_factor: float | None = None,
) -> GPTModel:
    """A decoder-only model on this rank's device; ``parallel_state`` and the random seeds are set.

    Args:
        config: sizes and parallelism.
        vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
        max_sequence_length: longest sequence, in tokens.
        tie_embeddings: the output projection is the embedding.
        rope_theta: base of the rotary wavelengths.
        rope_scaling_factor: Llama 3.1's stretching of long wavelengths; None: off.
    Returns:
        The model; called with token ids, positions, None and labels, each [B, S], it gives the loss of every token,
        [B, S], in nats.
    """
    model = GPTModel(
        config=config,
        transformer_layer_spec=gqa_block_spec(config),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        share_embeddings_and_output_weights=tie_embeddings,
        position_embedding_type="rope",
        rotary_base=rope_theta,
        rope_scaling=rope_scaling_factor is not None,
        rope_scaling_factor=rope_scaling_factor or 1.0,
    )
    return model.to(torch.cuda.current_device())


def weight_decay_groups(model: nn.Module) -> list[dict]:
    """Optimizer groups: matrices decay; norms and biases do not (``wd_mult`` is what Megatron's schedule reads)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "wd_mult": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "wd_mult": 0.0, "weight_decay": 0.0},
    ]
