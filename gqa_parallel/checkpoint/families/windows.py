"""Layers that see a window of keys, in the terms of a ``config.json``."""

from typing import Any

from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.errors import UserError


def window_of_all_layers(settings: Settings) -> dict[str, Any]:
    """Megatron-Core's names for a ``sliding_window`` that every layer has, or none."""
    return _window(settings.take("sliding_window"), None)


def window_of_local_layers(settings: Settings) -> dict[str, Any]:
    """Megatron-Core's names for the ``sliding_window`` of the local ones among ``layer_types``.

    Raises:
        UserError: a type of layer is not implemented, or there is no window for local layers.
    """
    window, types = settings.take("sliding_window"), settings.take("layer_types")
    known = ("full_attention", "sliding_attention")
    if unknown := sorted(set(types) - set(known)):
        raise UserError(
            f"layer_types ({', '.join(unknown)}) must be among {', '.join(known)}: no other layer is implemented. "
            "Convert a model of these."
        )
    local = [int(kind == "sliding_attention") for kind in types]
    if not any(local):
        return {}
    if window is None:
        raise UserError(
            "sliding_window (None) must be a number of keys where layer_types has sliding_attention: it is how far "
            "such a layer sees. Set it in config.json."
        )
    return _window(window, local)


def _window(num_keys: int | None, local_layers: list[int] | None) -> dict[str, Any]:
    # a query sees itself and the keys before it
    return {} if num_keys is None else {"window_size": (num_keys - 1, 0), "window_attn_skip_freq": local_layers}
