"""The tensors of a model under other names, in another order, or with fewer KV heads, none of them read yet."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gqa_parallel.checkpoint.families.family import Family
from gqa_parallel.checkpoint.families.names import Rows
from gqa_parallel.checkpoint.kv_pooling import check_pooling, pool_kv_heads
from gqa_parallel.checkpoint.lazy_tensor import Index, LazyTensor, stack_rows
from gqa_parallel.errors import UserError

QKV = "self_attention.linear_qkv"


def pooled_tensors(
    tensors: Mapping[str, LazyTensor],
    family: Family,
    config: Mapping[str, Any],
    new_num_kv_heads: int,
    pooling: str,
    seed: int,
) -> dict[str, LazyTensor]:
    """A model with fewer KV heads, under the same names.

    Args:
        tensors: of the whole model under Hugging Face's names.
        family, config: of the model; ``ModelArguments.config``.
        new_num_kv_heads, pooling: see ``pool_kv_heads``.
        seed: of ``random`` pooling; each tensor draws from a stream of its own.
    Raises:
        UserError: the heads cannot be pooled so, or a layer has no K or V.
    """
    num_kv_heads = config["num_query_groups"]
    check_pooling(num_kv_heads, new_num_kv_heads, pooling)
    pooled = dict(tensors)
    for layer in range(config["num_layers"]):
        prefix = family.layer.format(layer)
        for kind in ("weight", "bias"):
            segments: dict[str, list[range]] = defaultdict(list)
            for module, rows in family.modules[QKV].kv_rows(SimpleNamespace(**config)):
                segments[f"{prefix}{module}.{kind}"].append(rows)
            for name, heads in segments.items():
                if name in tensors:
                    pooled[name] = _pooled(tensors[name], name, heads, num_kv_heads, new_num_kv_heads, pooling, seed)
    return pooled


def full_tensors(
    tensors: Mapping[str, LazyTensor], family: Family, config: Mapping[str, Any], tie_embeddings: bool
) -> dict[str, LazyTensor]:
    """The parameters of our model at tensor-parallel size 1, made of Hugging Face's tensors.

    Args:
        tensors: of the whole model under Hugging Face's names.
        family, config: of the model; ``ModelArguments.config``.
        tie_embeddings: a stored copy of the output layer is passed over.
    Raises:
        UserError: tensors are missing, left over or of another shape; names them.
    """
    full: dict[str, LazyTensor] = {}
    used: set[str] = set()
    kinds_of: dict[str, set[str]] = defaultdict(set)  # module within a layer -> what it has in the first one
    for layer, path, module in _modules(family, config["num_layers"]):
        if module == "output_layer" and tie_embeddings:
            continue
        for kind in ("weight", "bias"):
            name = f"{path}.{kind}"
            parts = {rows.tensor for rows in family.rows(name, 0, SimpleNamespace(**config))}
            found = parts & tensors.keys()
            if layer in (None, 0) and found:
                kinds_of[module].add(kind)
            if not found and kind not in kinds_of[module]:
                continue
            if missing := parts - found:
                raise UserError(
                    f"tensors ({len(tensors)}) must be those of the model: they lack {', '.join(sorted(missing))}. "
                    "Fetch all files of the folder."
                )
            size = sum(tensors[part].shape[0] for part in parts)
            full[name] = _stacked(family.rows(name, size, SimpleNamespace(**config)), tensors)
            used |= found
    _refuse_leftovers(tensors, used, tie_embeddings)
    return full


def huggingface_tensors(
    full: Mapping[str, LazyTensor], family: Family, config: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """Hugging Face's tensors, made of the parameters of our model at tensor-parallel size 1.

    Args:
        full: as ``full_tensors`` gives them.
        family, config: of the model; ``ModelArguments.config``.
    Raises:
        UserError: the family has no such parameter; names it.
    """
    pieces: dict[str, list[tuple[range, LazyTensor, range]]] = defaultdict(list)
    for name, tensor in full.items():
        try:
            sources = family.rows(name, tensor.shape[0], SimpleNamespace(**config))
        except KeyError:
            raise UserError(
                f"parameters ({name}) must be among those of {family.model_type}: it has none such. "
                "Train a model of the family to export it."
            ) from None
        offset = 0
        for part, rows in sources:
            pieces[part].append((rows, tensor, range(offset, offset + len(rows))))
            offset += len(rows)
    return {
        name: stack_rows([(tensor, rows) for _, tensor, rows in sorted(parts, key=lambda part: part[0].start)])
        for name, parts in pieces.items()
    }


def _modules(family: Family, num_layers: int) -> Iterator[tuple[int | None, str, str]]:
    """Our modules: the layer's number (None: outside), the whole path and the name within the family's."""
    outside = ("embedding.word_embeddings", "decoder.final_layernorm", "output_layer")
    yield None, outside[0], outside[0]
    for layer in range(num_layers):
        for module in family.modules:
            if module not in outside:
                yield layer, f"decoder.layers.{layer}.{module}", module
    for module in outside[1:]:
        yield None, module, module


def _stacked(sources: list[Rows], tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    sizes: dict[str, int] = defaultdict(int)
    for part, rows in sources:
        sizes[part] += len(rows)
    for part, size in sizes.items():
        if tensors[part].shape[0] != size:
            raise UserError(
                f"{part} {list(tensors[part].shape)} must have {size} rows: config.json and tensors disagree. Pass the "
                "tensors that belong to this config.json."
            )
    return stack_rows([(tensors[part], rows) for part, rows in sources])


def _refuse_leftovers(tensors: Mapping[str, LazyTensor], used: set[str], tie_embeddings: bool) -> None:
    # transformers, too, passes over a stored copy of a tied output layer, and over frequencies in old files
    passed_over = {"lm_head.weight"} if tie_embeddings else set()
    left = [name for name in tensors if name not in used | passed_over and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise UserError(
            f"tensors ({len(tensors)}) must be those of the model: they hold besides {', '.join(sorted(left))}. "
            "Remove them, or the config.json is another model's."
        )


def _pooled(
    tensor: LazyTensor, name: str, heads: list[range], num_kv_heads: int, new_num_kv_heads: int, pooling: str, seed: int
) -> LazyTensor:
    """A tensor of which some rows are K or V heads; others stay."""
    pieces, end = [], 0
    for rows in heads:
        if rows.stop > tensor.shape[0]:
            raise UserError(
                f"{name} {list(tensor.shape)} must have {rows.stop} rows: config.json and tensors disagree. Pass the "
                "tensors that belong to this config.json."
            )
        if rows.start > end:
            pieces.append((tensor, range(end, rows.start)))
        head = _pooled_rows(tensor, f"{name} {rows.start} {seed}", rows, num_kv_heads, new_num_kv_heads, pooling)
        pieces.append((head, range(head.shape[0])))
        end = rows.stop
    if end < tensor.shape[0]:
        pieces.append((tensor, range(end, tensor.shape[0])))
    return stack_rows(pieces)


def _pooled_rows(
    tensor: LazyTensor, stream: str, rows: range, num_kv_heads: int, new_num_kv_heads: int, pooling: str
) -> LazyTensor:
    shape = (len(rows) // num_kv_heads * new_num_kv_heads, *tensor.shape[1:])

    def read(index: Index) -> Tensor:
        return _pool_and_keep(tensor, stream, rows, num_kv_heads, new_num_kv_heads, pooling)[index]

    return LazyTensor(shape, tensor.dtype, read)


@lru_cache(maxsize=2)  # K and V of a layer are asked for in turn, head by head
def _pool_and_keep(
    tensor: LazyTensor, stream: str, rows: range, num_kv_heads: int, new_num_kv_heads: int, pooling: str
) -> Tensor:
    weight = tensor[(slice(rows.start, rows.stop),)]
    number = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "big")
    return pool_kv_heads(weight, num_kv_heads, new_num_kv_heads, pooling, torch.Generator().manual_seed(number))
