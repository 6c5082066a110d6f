"""A model folder of Hugging Face or a checkpoint of ours as the one or the other, with fewer KV heads if asked for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from gqa_parallel.checkpoint.conversion import pooled_tensors
from gqa_parallel.checkpoint.folders import (
    appearing_whole,
    progress_bar,
    refuse_existing,
    write_companions,
    write_folder,
)
from gqa_parallel.checkpoint.native_weights import write_native_weights
from gqa_parallel.training.model_arguments import model_config_of
from gqa_parallel.training.weights import Weights, open_weights


@dataclass(frozen=True)
class Converted:
    """What was written: bytes of tensors, their number, the family and the KV heads before and after."""

    num_bytes: int
    num_tensors: int
    model_type: str
    old_num_kv_heads: int
    num_kv_heads: int


def convert(
    source: str,
    target: str,
    native: bool = False,
    num_kv_heads: int | None = None,
    pooling: str = "mean",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Converted:
    """Write ``source`` as ``target``; a block of a tensor is in memory at a time.

    Args:
        source: see ``open_weights``.
        target: a new folder, complete when it appears.
        native: write a checkpoint of ours, of weights alone, in fp32; else a model folder of Hugging Face.
        num_kv_heads: a divisor of the model's; None: the model's.
        pooling, seed: see ``pool_kv_heads``.
        dtype: of a model folder's tensors; None: as in the source. From a checkpoint of ours, what ``config.json``
            says, or fp32.
    Raises:
        UserError: with the values and a way out.
    """
    refuse_existing(Path(target))
    weights = open_weights("source", source)
    old_num_kv_heads = weights.arguments.config["num_query_groups"]
    weights.full_tensors()  # refuses tensors that are not the model's
    if num_kv_heads is not None:
        weights = with_fewer_kv_heads(weights, num_kv_heads, pooling, seed)
    tensors = weights.full_tensors() if native else weights.tensors
    if native:
        dtype = torch.float32
    elif dtype is None:
        dtype = _stored_dtype(weights)
    else:
        config = {key: value for key, value in weights.config.items() if key != "torch_dtype"}
        weights = replace(weights, config=config | {"dtype": str(dtype).removeprefix("torch.")})
    num_bytes = sum(_num_bytes(tensor.shape, dtype or tensor.dtype) for tensor in tensors.values())
    with appearing_whole(Path(target)) as folder, progress_bar(num_bytes) as advance:
        if native:
            write_native_weights(folder, tensors, _description(weights), advance)
            write_companions(folder, weights.config, weights.carried)
        else:
            write_folder(folder, weights.config, tensors, weights.carried, dtype, advance)
    return Converted(
        num_bytes,
        len(tensors),
        weights.family.model_type,
        old_num_kv_heads,
        weights.arguments.config["num_query_groups"],
    )


def with_fewer_kv_heads(weights: Weights, num_kv_heads: int, pooling: str, seed: int) -> Weights:
    """The same model with pooled KV heads (arXiv:2305.13245), an ordinary one of its family.

    Raises:
        UserError: the heads cannot be pooled so.
    """
    tensors = pooled_tensors(weights.tensors, weights.family, weights.arguments.config, num_kv_heads, pooling, seed)
    return replace(weights, config=weights.config | {"num_key_value_heads": num_kv_heads}, tensors=tensors)


def _stored_dtype(weights: Weights) -> torch.dtype | None:
    """What ``config.json`` says of the tensors that a checkpoint of ours keeps in fp32; None: leave tensors alone."""
    if any(tensor.dtype != torch.float32 for tensor in weights.tensors.values()):
        return None
    name = weights.config.get("dtype", weights.config.get("torch_dtype"))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes.get(name)


def _description(weights: Weights) -> dict[str, Any]:
    model = model_config_of(weights.arguments, weights.config["model_type"])
    resolved = OmegaConf.to_container(OmegaConf.structured(model), resolve=True, enum_to_str=True)
    return {"holds": "weights", "config": {"model": resolved}}


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
