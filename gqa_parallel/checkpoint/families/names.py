"""Which rows of which Hugging Face tensors a full tensor of ours is made of."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron.core.transformer import TransformerConfig

from gqa_parallel.partition.qkv_layout import block_map, huggingface_layout, megatron_layout


class Rows(NamedTuple):
    """Consecutive indices of a tensor, along the dimension in which the full tensor is stacked."""

    tensor: str
    indices: range


class Source(Protocol):
    """A module of Hugging Face, or several, whose tensors are stacked to the full tensor of one of ours."""

    def rows(self, size: int, config: TransformerConfig) -> list[Rows]:
        """
        Args:
            size: of the full tensor along the stacked dimension.
            config: the model's.
        Returns:
            Rows of modules (not yet of their ``weight`` or ``bias``), in the order of the full tensor.
        """


@dataclass(frozen=True)
class Stacked:
    """Modules of equal height one below the other; with one, the same tensor under another name."""

    modules: tuple[str, ...]

    def rows(self, size: int, config: TransformerConfig) -> list[Rows]:
        return [Rows(module, range(size // len(self.modules))) for module in self.modules]


@dataclass(frozen=True)
class SplitQKV:
    """``q_proj``, ``k_proj`` and ``v_proj`` apart."""

    q: str
    k: str
    v: str

    def rows(self, size: int, config: TransformerConfig) -> list[Rows]:
        heads = megatron_layout(config.num_attention_heads, config.num_query_groups)
        return [Rows(getattr(self, kind), _head(index, config)) for kind, index in heads]

    def kv_rows(self, config: TransformerConfig) -> list[Rows]:
        """The rows of all K heads, then those of all V heads."""
        heads = range(config.num_query_groups * config.kv_channels)
        return [Rows(self.k, heads), Rows(self.v, heads)]


@dataclass(frozen=True)
class FusedQKV:
    """One module: all queries, all keys, all values."""

    module: str

    def rows(self, size: int, config: TransformerConfig) -> list[Rows]:
        layout = config.num_attention_heads, config.num_query_groups
        places = block_map(huggingface_layout(*layout), megatron_layout(*layout))
        return [Rows(self.module, _head(place, config)) for place in places]

    def kv_rows(self, config: TransformerConfig) -> list[Rows]:
        """The rows of all K heads, then those of all V heads."""
        num_q, num_kv = (heads * config.kv_channels for heads in (config.num_attention_heads, config.num_query_groups))
        return [
            Rows(self.module, range(num_q, num_q + num_kv)),
            Rows(self.module, range(num_q + num_kv, num_q + 2 * num_kv)),
        ]


def _head(place: int, config: TransformerConfig) -> range:
    return range(place * config.kv_channels, (place + 1) * config.kv_channels)
