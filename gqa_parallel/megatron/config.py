"""Megatron's ``TransformerConfig`` for every head partition."""

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from gqa_parallel.attention.rope import Rope
from gqa_parallel.errors import UserError
from gqa_parallel.partition.heads import HeadPartition


@dataclass
class GQATransformerConfig(TransformerConfig):
    """A ``TransformerConfig`` that admits every partition of ``HeadPartition``, uneven and replicated ones too.

    Megatron's own names ask for the variants that it has: ``window_size`` and ``window_attn_skip_freq`` (local layers),
    ``softmax_scale``, ``softmax_type="learnable"`` (sinks), ``attention_output_gate``, ``rotary_interleaved``,
    ``no_rope_freq`` (layers without positions).

    Megatron refuses ``num_attention_heads % tensor_model_parallel_size != 0`` and a number of query groups that neither
    divides nor is divided by it. All else is checked as Megatron does.

    Raises:
        UserError: the heads admit no partition; names both values and what works.
    """

    rope: Rope | None = None  # the layer's own angles; None: those that the model passes
    local_rope: Rope | None = None  # of the layers with a window, where it differs
    attention_softcap: float | None = None  # largest attention score, approached by tanh

    use_cpu_initialization: bool = True  # the full weight is drawn and sliced: the same start at every tp size
    masked_softmax_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    bias_dropout_fusion: bool = False
    persist_layer_norm: bool = False
    add_bias_linear: bool = False

    def __post_init__(self) -> None:
        heads, groups, tp_size = (
            self.num_attention_heads,
            self.num_query_groups,
            self.tensor_model_parallel_size,
        )
        groups = heads if groups is None else groups
        HeadPartition(heads, groups, tp_size)
        if self.kv_channels is None:
            if self.hidden_size % heads:
                raise UserError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({heads}): "
                    "head_dim is their quotient. Set kv_channels (head_dim)."
                )
            self.kv_channels = self.hidden_size // heads
        try:  # Megatron's own checks see heads that it can cut evenly
            self.num_attention_heads = self.num_query_groups = tp_size
            super().__post_init__()
        finally:
            self.num_attention_heads, self.num_query_groups = heads, groups
