"""Which part of which full tensor each parameter of a tensor-parallel rank is.

The full tensors are the parameters of the same model at tensor-parallel size 1, under the same names: ``linear_qkv``
group-interleaved over all heads, a gated ``linear_fc1`` as gates above ups, the vocabulary without its padding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from gqa_parallel.megatron.self_attention import GQASelfAttention
from gqa_parallel.partition.heads import HeadPartition
from gqa_parallel.partition.qkv_layout import block_map, megatron_layout, rank_layout


@dataclass(frozen=True)
class Sharding:
    """How the ranks of a tensor-parallel group hold a full tensor.

    Args:
        name: of the full tensor.
        shape: of the full tensor.
        dim: the dimension that is cut; any, where nothing is.
        pieces: for each rank, the ranges of the full tensor's indices along ``dim`` that it holds, in its order.
        padded_size: a rank's size along ``dim`` where padding follows its pieces; None: there is none.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    pieces: tuple[tuple[range, ...], ...]
    padded_size: int | None = None

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the part of ``rank``, padding included."""
        size = sum(map(len, self.pieces[rank])) if self.padded_size is None else self.padded_size
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def owned(self, rank: int) -> tuple[range, ...]:
        """The pieces that no lower rank holds: over all ranks, each index of the full tensor once."""
        lower = {piece for pieces in self.pieces[:rank] for piece in pieces}
        return tuple(piece for piece in self.pieces[rank] if piece not in lower)

    def slice(self, full: Tensor, rank: int) -> Tensor:
        """The part of ``rank``, a copy; padding is zero."""
        part = full.new_zeros(self.local_shape(rank))
        for piece, offset in self._placed(rank):
            part.narrow(self.dim, offset, len(piece)).copy_(full.narrow(self.dim, piece.start, len(piece)))
        return part

    def place(self, part: Tensor, full: Tensor, rank: int) -> None:
        """Write the part of ``rank`` into the full tensor; padding is dropped."""
        for piece, offset in self._placed(rank):
            full.narrow(self.dim, piece.start, len(piece)).copy_(part.narrow(self.dim, offset, len(piece)))

    def _placed(self, rank: int) -> Iterator[tuple[range, int]]:
        """The pieces of ``rank``, each with where it begins in the rank's part."""
        offset = 0
        for piece in self.pieces[rank]:
            yield piece, offset
            offset += len(piece)


def full_parameters(model: nn.Module, tp_size: int) -> Iterator[tuple[str, nn.Parameter, Sharding]]:
    """Every parameter of this rank, in the order of ``named_parameters``, with its name and its place.

    Several parameters can be parts of one full tensor: where KV heads are replicated, ``linear_q`` and ``linear_kv``
    are parts of ``linear_qkv``.

    Args:
        model: Megatron-Core modules with self-attention of ours. A model with an ``unpadded_vocab_size`` has full
            vocabulary tensors of so many rows; else padding counts as vocabulary. Under ZeRO-3 only the shapes are
            read here; gather a parameter before its data is.
        tp_size: tensor-parallel ranks.
    """
    modules = dict(model.named_modules())
    attentions = {name: module for name, module in modules.items() if isinstance(module, GQASelfAttention)}
    gated = {
        f"{name}.linear_fc1"
        for name, module in modules.items()
        if isinstance(module, MLP) and module.config.gated_linear_unit
    }
    vocabulary = ("embedding.word_embeddings", "output_layer")
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        attention = next((path for path in attentions if name.startswith(f"{path}.")), None)
        sharding = None
        if attention is not None:
            path = name.removeprefix(f"{attention}.")
            sharding = _of_heads(attentions[attention], f"{attention}.", path, shape)
        if sharding is None:
            dim = _cut_dimension(modules[owner], kind, parameter)
            num_rows = getattr(model, "unpadded_vocab_size", None) if owner in vocabulary else None
            sharding = _of_even_shares(name, shape, dim, tp_size, 2 if owner in gated else 1, num_rows)
        yield name, parameter, sharding


def _cut_dimension(module: nn.Module, kind: str, parameter: nn.Parameter) -> int | None:
    """The dimension that Megatron cuts into even shares; None: every rank holds the whole."""
    if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
        return 0
    if isinstance(module, RowParallelLinear):
        return 1 if kind == "weight" else None
    dim = getattr(parameter, "partition_dim", -1)  # Transformer Engine's linears say it here
    return None if dim < 0 else dim


def _of_even_shares(
    name: str, shape: tuple[int, ...], dim: int | None, tp_size: int, num_stacked: int, num_rows: int | None
) -> Sharding:
    """Each of ``num_stacked`` equal blocks of the full tensor is cut into even, consecutive shares.

    Args:
        shape: a rank's.
        num_rows: size of the full tensor along ``dim`` without padding; None: all that ranks hold.
    """
    if dim is None:
        return Sharding(name, shape, 0, ((range(shape[0]),),) * tp_size)
    size = shape[dim] * tp_size if num_rows is None else num_rows
    share, block = shape[dim] // num_stacked, shape[dim] * tp_size // num_stacked
    pieces = tuple(
        tuple(
            range(start, min(start + share, size))
            for start in (index * block + rank * share for index in range(num_stacked))
            if start < size
        )
        for rank in range(tp_size)
    )
    full_shape = (*shape[:dim], size, *shape[dim + 1 :])
    return Sharding(name, full_shape, dim, pieces, None if num_rows is None else shape[dim])


def _of_heads(layer: GQASelfAttention, prefix: str, path: str, shape: tuple[int, ...]) -> Sharding | None:
    """The sharding of a parameter that is cut by heads; None for others."""
    partition, head_dim = layer.partition, layer.head_dim
    linear, _, kind = path.partition(".")
    if linear in ("linear_qkv", "linear_q", "linear_kv"):
        everything = megatron_layout(partition.num_heads, partition.num_kv_heads, layer.output_gate)
        blocks_of = {"linear_qkv": slice(None), "linear_q": slice(None, -2), "linear_kv": slice(-2, None)}[linear]
        pieces = tuple(
            _ranges(block_map(everything, rank_layout(partition, rank, layer.output_gate)[blocks_of]), head_dim)
            for rank in range(partition.tp_size)
        )
        return Sharding(f"{prefix}linear_qkv.{kind}", (len(everything) * head_dim, *shape[1:]), 0, pieces)
    if path == "linear_proj.weight":
        full_shape = (shape[0], partition.num_heads * head_dim)
        return Sharding(prefix + path, full_shape, 1, _query_heads(partition, head_dim))
    if path == "core_attention.softmax_offset":
        return Sharding(prefix + path, (partition.num_heads,), 0, _query_heads(partition, 1))
    return None


def _query_heads(partition: HeadPartition, width: int) -> tuple[tuple[range, ...], ...]:
    return tuple(_ranges(partition.query_heads(rank), width) for rank in range(partition.tp_size))


def _ranges(blocks: Iterable[int], width: int) -> tuple[range, ...]:
    """The indices of blocks that are ``width`` wide, neighbours joined."""
    ranges: list[range] = []
    for block in blocks:
        start, stop = block * width, (block + 1) * width
        if ranges and ranges[-1].stop == start:
            start = ranges.pop().start
        ranges.append(range(start, stop))
    return tuple(ranges)


def gather_full(parts: list[tuple[Tensor, Sharding]], tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """The full tensor, on every rank of ``tp_group``.

    Args:
        parts: what this rank holds of it, in the same order on every rank.
    Returns:
        A tensor of ``Sharding.shape``; of copies, the last rank's.
    Communication: each rank broadcasts its parts.
    """
    first, sharding = parts[0]
    full = first.new_empty(sharding.shape)
    for part, sharding in parts:
        for rank in range(tp_group.size()):
            if rank == tp_group.rank():
                received = part.detach().contiguous()
            else:
                received = part.new_empty(sharding.local_shape(rank))
            torch.distributed.broadcast(received, group=tp_group, group_src=rank)
            sharding.place(received, full, rank)
    return full
