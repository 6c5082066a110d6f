"""Parameters that several tensor-parallel ranks hold, each seeing only a part of the gradient.

Such a parameter must be equal on all its ranks, get the sum of their gradients, and count once in the gradient norm.
Three kinds exist: KV projections of replicated heads, QK-norm weights (each rank sees its own heads), and, under
sequence parallelism, the block's norms and biases (each rank sees its part of the sequence).
"""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

_GROUP = "gradient_sum_group"


def share(module: nn.Module | None, group: ProcessGroup) -> None:
    """Declare that the ranks of ``group`` hold the same parameters of ``module`` and see parts of the gradients."""
    if module is not None and group.size() > 1:
        for parameter in module.parameters():
            setattr(parameter, _GROUP, group)


def shared_parameters(model: nn.Module, tp_group: ProcessGroup) -> Iterator[tuple[str, nn.Parameter, ProcessGroup]]:
    """Name, parameter and ranks of every shared parameter of ``model``, in the order of ``named_parameters``.

    Besides those that ``share`` declared, these are the ones that Megatron tags ``sequence_parallel``: they are shared
    by the whole ``tp_group``.
    """
    for name, parameter in model.named_parameters():
        group = getattr(parameter, _GROUP, None)
        if group is None and getattr(parameter, "sequence_parallel", False) and tp_group.size() > 1:
            group = tp_group
        if group is not None:
            yield name, parameter, group


def sum_shared_gradients(model: nn.Module, tp_group: ProcessGroup) -> list[RemovableHandle]:
    """From now on, sum the gradient of each shared parameter over its ranks as the backward pass produces it.

    Call it once, after everything that replaces a parameter's storage or registers gradient hooks of its own
    (``deepspeed.initialize``); ZeRO 2 and 3 then reduce over data parallelism what this has summed already.

    Communication: per shared parameter and backward pass, one all-reduce of its size over its group, in its dtype.
    Source: arXiv:1909.08053 section 3; arXiv:2205.05198 section 4.2.2 (sequence parallelism).
    """

    def sum_over(group: ProcessGroup):
        def hook(grad: Tensor) -> Tensor:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=group)
            return grad

        return hook

    return [parameter.register_hook(sum_over(group)) for _, parameter, group in shared_parameters(model, tp_group)]


def mark_owners(model: nn.Module, tp_group: ProcessGroup) -> None:
    """Set ``tensor_model_parallel`` so that Megatron's and DeepSpeed's gradient norms count each parameter once.

    Both count a parameter on every TP rank if the mark is true, else on TP rank 0 only. So a shared parameter is
    marked on the first rank of its group and on no other.
    """
    for _, parameter, group in shared_parameters(model, tp_group):
        parameter.tensor_model_parallel = group.rank() == 0
