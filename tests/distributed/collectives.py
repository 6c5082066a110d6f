"""Counts the collectives of a block of code, with their bytes; run inside the ranks."""

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gqa_parallel.attention.shared_parameters import sum_shared_gradients
from tests.distributed.layers import build_layer, layer_config


class CollectiveLog(TorchDispatchMode):
    """Records (name, bytes of the unsharded tensor) of every c10d collective."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            sizes = [x.nbytes for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
            self.entries.append((name.strip("_"), max(sizes)))
        return func(*args, **(kwargs or {}))


def collectives_of_one_layer(shape: dict, sequence_parallel: bool, sequence: int, batch: int) -> dict:
    """Forward and backward of one layer in float32.

    Returns:
        ``forward`` and ``backward``: [(collective, bytes)], in order.
    """
    tp_group = parallel_state.get_tensor_model_parallel_group()
    config = layer_config(shape, tp_group.size(), sequence_parallel=sequence_parallel, params_dtype=torch.float32)
    layer = build_layer(config)
    sum_shared_gradients(layer, tp_group)
    local_sequence = sequence // tp_group.size() if sequence_parallel else sequence
    hidden = torch.randn(local_sequence, batch, shape["hidden_size"], requires_grad=True)
    with CollectiveLog() as forward:
        out, _ = layer(hidden)
    with CollectiveLog() as backward:
        out.sum().backward()
    return {"forward": forward.entries, "backward": backward.entries}
