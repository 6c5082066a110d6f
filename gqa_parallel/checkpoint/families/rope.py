"""Rotary positions in the terms of a ``config.json``."""

from collections.abc import Mapping
from typing import Any

from gqa_parallel.attention.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling
from gqa_parallel.errors import UserError


def rope_of(parameters: Mapping[str, Any], max_position_embeddings: int) -> Rope:
    """``rope_parameters`` of one kind of layer.

    Args:
        parameters: ``rope_type``, ``rope_theta`` and what the type needs.
        max_position_embeddings: of the model.
    Raises:
        UserError: a type or a parameter is not implemented.
    """
    left = dict(parameters)
    kind = left.pop("rope_type", "default")
    theta, fraction = left.pop("rope_theta"), left.pop("partial_rotary_factor", 1.0)
    if kind not in _SCALINGS:
        raise UserError(
            f"rope_type ({kind!r}) must be one of {', '.join(_SCALINGS)}: no other is implemented. "
            "Convert a model with one of these."
        )
    scaling = _SCALINGS[kind](left, max_position_embeddings)  # transformers has seen to what the type needs
    if left:
        raise UserError(
            f"rope_parameters ({', '.join(sorted(left))}) must not be set for rope_type {kind!r}: it has no such "
            "parameter. Remove it from config.json."
        )
    return Rope(theta=float(theta), fraction=float(fraction), scaling=scaling)


def _default(left: dict[str, Any], max_position_embeddings: int) -> None:
    left.pop("original_max_position_embeddings", None)


def _linear(left: dict[str, Any], max_position_embeddings: int) -> Scaling:
    left.pop("original_max_position_embeddings", None)
    return LinearScaling(left.pop("factor"))


def _llama3(left: dict[str, Any], max_position_embeddings: int) -> Scaling:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return Llama3Scaling(**{name: left.pop(name) for name in names})


def _dynamic(left: dict[str, Any], max_position_embeddings: int) -> Scaling:
    # transformers stretches from the model's own length and passes over the original one
    left.pop("original_max_position_embeddings", None)
    return DynamicScaling(left.pop("factor"), max_position_embeddings)


def _yarn(left: dict[str, Any], max_position_embeddings: int) -> Scaling:
    original = left.pop("original_max_position_embeddings", max_position_embeddings)
    factor = left.pop("factor", None)
    optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    given = {name: left.pop(name) for name in optional if name in left}
    return YarnScaling(
        factor=max_position_embeddings / original if factor is None else factor,
        original_max_position_embeddings=original,
        **{name: value for name, value in given.items() if value is not None},
    )


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "dynamic": _dynamic, "yarn": _yarn}
