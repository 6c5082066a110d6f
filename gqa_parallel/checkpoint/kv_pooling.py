"""Fewer KV heads from a trained model's: the first step of uptraining (arXiv:2305.13245, section 2.1).

The KV heads of neighbouring groups become one head, which then serves the query heads of all of them. Pooling is over
heads, component by component: a K head's components keep their places, so rotary positions turn them as before.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gqa_parallel.errors import UserError, one_of


def pool_kv_heads(
    weight: Tensor, num_kv_heads: int, new_num_kv_heads: int, pooling: str, generator: torch.Generator | None = None
) -> Tensor:
    """The weight or bias of a K or V projection with fewer heads.

    Args:
        weight: [num_kv_heads * head_dim, ...], any float dtype (kept; means are taken in fp32 or wider).
        num_kv_heads: heads of ``weight``.
        new_num_kv_heads: heads of the result; head ``j`` is made of ``num_kv_heads // new_num_kv_heads`` neighbours.
        pooling: ``mean`` of the neighbours, the ``first`` of them, or ``random``: new values drawn from
            N(0, std of ``weight``).
        generator: of ``random``; None: torch's own.
    Returns:
        [new_num_kv_heads * head_dim, ...], a new tensor.
    Raises:
        UserError: an unknown pooling, or heads that cannot be shared evenly.
    """
    check_pooling(num_kv_heads, new_num_kv_heads, pooling)
    if num_kv_heads == new_num_kv_heads:
        return weight.clone()
    heads = weight.unflatten(0, (new_num_kv_heads, num_kv_heads // new_num_kv_heads, -1))
    return POOLINGS[pooling](heads, generator).flatten(0, 1)


def check_pooling(num_kv_heads: int, new_num_kv_heads: int, pooling: str) -> None:
    """
    Raises:
        UserError: an unknown pooling, or ``new_num_kv_heads`` does not divide ``num_kv_heads``.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling ({pooling}) must be one of {', '.join(POOLINGS)}: no other is known. Use mean.")
    if new_num_kv_heads < 1 or num_kv_heads % new_num_kv_heads:
        sizes = [size for size in range(1, num_kv_heads + 1) if num_kv_heads % size == 0]
        raise UserError(
            f"num_kv_heads ({new_num_kv_heads}) must divide the model's num_kv_heads ({num_kv_heads}): each new KV "
            f"head is made of equally many. Use num_kv_heads={one_of(sizes)}."
        )


def _mean(heads: Tensor, generator: torch.Generator | None) -> Tensor:
    # head by head: a whole weight in fp32 would double its memory
    wide = torch.promote_types(heads.dtype, torch.float32)
    return torch.stack([group.mean(0, dtype=wide).to(heads.dtype) for group in heads])


def _first(heads: Tensor, generator: torch.Generator | None) -> Tensor:
    return heads[:, 0].clone()


def _random(heads: Tensor, generator: torch.Generator | None) -> Tensor:
    std = heads.float().std(correction=0).item()
    # drawn in fp32, so that a seed gives the same weights in every dtype up to rounding
    return (torch.randn(heads[:, 0].shape, generator=generator) * std).to(heads.dtype)


POOLINGS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "mean": _mean,
    "first": _first,
    "random": _random,
}
"""How the heads of a group, [new heads, neighbours, head_dim, ...], become one: [new heads, head_dim, ...]."""
