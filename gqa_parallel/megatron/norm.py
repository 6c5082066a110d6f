"""LayerNorm and RMSNorm of torch as Megatron-Core builds them, sequence parallelism included."""

from megatron.core.transformer import TransformerConfig
from torch import nn


class TorchNorm:
    """A spec's norm builder: ``torch.nn.RMSNorm`` or ``LayerNorm``, as ``config.normalization`` says.

    Unlike Megatron's ``WrappedTorchNorm`` it admits sequence parallelism: its parameters get Megatron's
    ``sequence_parallel`` tag, and ``sum_shared_gradients`` then sums their gradients.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused) -> nn.Module:
        norm = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization](hidden_size, eps=eps)
        norm.to(config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
