"""Specs: Megatron-Core's transformer layer with grouped-query attention of ours."""

import copy
from typing import TypeVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from gqa_parallel.errors import UserError
from gqa_parallel.megatron.norm import TorchNorm
from gqa_parallel.megatron.self_attention import GQASelfAttention

Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules)


def with_gqa(spec: Spec) -> Spec:
    """The same layer or block, with its self-attention replaced.

    Train it with ``deepspeed_engine``. Megatron's own ``finalize_model_grads`` sums what it knows, QK-norms and what
    sequence parallelism shares, but not replicated KV heads: with it, keep tensor parallelism at or below their number.

    Args:
        spec: a layer's ``ModuleSpec`` (local or Transformer Engine), a ``TransformerBlockSubmodules``, or a
            ``ModuleSpec`` of a block. It is not changed.
    Raises:
        UserError: there is no ``SelfAttention`` in ``spec``.
    """
    new = copy.deepcopy(spec)
    if isinstance(new, TransformerBlockSubmodules):
        new.layer_specs = [with_gqa(layer) for layer in new.layer_specs]
        return new
    if isinstance(new.submodules, TransformerBlockSubmodules):
        new.submodules = with_gqa(new.submodules)
        return new
    attention = getattr(new.submodules, "self_attention", None)
    module = getattr(attention, "module", attention)
    if not (isinstance(module, type) and issubclass(module, (SelfAttention, GQASelfAttention))):
        raise UserError(
            f"spec.self_attention ({getattr(module, '__name__', module)}) must be Megatron's SelfAttention: only that "
            "can be replaced. Pass a layer or block spec of a GPT."
        )
    attention.module = GQASelfAttention
    return new


def gqa_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """A pre-norm GPT layer of Megatron-Core's own linears and MLP, torch's norms and grouped-query attention.

    It needs neither Apex nor Transformer Engine, and admits every partition and sequence parallelism.
    """
    spec = with_gqa(get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization))
    layer: TransformerLayerSubmodules = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = TorchNorm
    if config.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = TorchNorm
    return spec


def gqa_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """``config.num_layers`` of ``gqa_layer_spec`` and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[gqa_layer_spec(config)] * config.num_layers, layer_norm=TorchNorm)
