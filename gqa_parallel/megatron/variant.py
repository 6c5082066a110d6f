"""What a model has outside attention that Megatron-Core's ``GPTModel`` has not: Gemma 2 and 3, Granite."""

import copy
from dataclasses import dataclass

from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from gqa_parallel.megatron.norm import TorchNorm


@dataclass(frozen=True)
class GPTVariant:
    """Departures from the pre-norm transformer; the default departs nowhere.

    Args:
        embedding_multiplier: factor on the embeddings, rounded to their dtype (Gemma: the square root of the width).
        post_norms: a norm on the output of attention and on that of the MLP, before the residual sum (Gemma 2,
            arXiv:2408.00118).
        residual_multiplier: factor on both before the residual sum (Granite).
        logit_multiplier: factor on the logits (Granite: the inverse of ``logits_scaling``).
        logit_softcap: largest logit, approached by tanh (Gemma 2); None: none.
    """

    embedding_multiplier: float = 1.0
    post_norms: bool = False
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None


class BranchOutputLinear(RowParallelLinear):
    """The last linear of attention or MLP, with what happens to its output before the residual sum.

    ``multiplier * norm(x W^T + b)``, on each position alone: under sequence parallelism on this rank's positions.

    Args: those of ``RowParallelLinear``, and
        post_norm: there is a norm, ``post_layernorm``.
        multiplier: factor on the result.
    """

    def __init__(
        self, *args, config: TransformerConfig, post_norm: bool = False, multiplier: float = 1.0, **kwargs
    ) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_layernorm = TorchNorm(config, self.output_size, config.layernorm_epsilon) if post_norm else None
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """
        Args:
            x: [S, B, width of this rank].
        Returns:
            [S, B, D] ([S / T, B, D] under sequence parallelism), and no bias: it is added already.
        """
        out, bias = super().forward(x)
        if bias is not None:
            out = out + bias
        if self.post_layernorm is not None:
            out = self.post_layernorm(out)
        return out if self.multiplier == 1 else out * self.multiplier, None


def with_variant(block: TransformerBlockSubmodules, variant: GPTVariant) -> TransformerBlockSubmodules:
    """The same block of Megatron-Core's own linears, with what ``variant`` changes inside its layers."""
    if not variant.post_norms and variant.residual_multiplier == 1:
        return block
    block = copy.deepcopy(block)
    linear = ModuleSpec(
        BranchOutputLinear, params={"post_norm": variant.post_norms, "multiplier": variant.residual_multiplier}
    )
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.linear_proj = linear
        layer.submodules.mlp.submodules.linear_fc2 = linear
    return block
