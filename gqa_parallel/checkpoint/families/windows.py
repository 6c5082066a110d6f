"""Layers that see a window of keys, in the terms of a ``config.json``."""

from typing import Any

from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.errors import UserError


def windows_of(settings: Settings) -> dict[str, Any]:
    """Megatron-Core's names for ``sliding_window`` and ``layer_types``.

    Without ``layer_types`` every layer has the window, if there is one.

    Raises:
        UserError: a type of layer is not implemented, or there is no window for local layers.
    """
    window, types = settings.take("sliding_window"), settings.take("layer_types")
    known = ("full_attention", "sliding_attention")
    if unknown := sorted(set(types or ()) - set(known)):
        raise UserError(
            f"layer_types ({', '.join(unknown)}) must be among {', '.join(known)}: no other layer is implemented. "
            "Convert a model of these."
        )
    local = None if types is None else [int(kind == "sliding_attention") for kind in types]
    if window is None and local and any(local):
        raise UserError(
            "sliding_window (None) must be a number of keys where layer_types has sliding_attention: it is how far "
            "such a layer sees. Set it in config.json."
        )
    if window is None or (local is not None and not any(local)):
        return {}
    # a query sees itself and the window - 1 keys before it
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": local}
