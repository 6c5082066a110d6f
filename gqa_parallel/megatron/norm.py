"""LayerNorm and RMSNorm of torch as Megatron-Core builds them, sequence parallelism included."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from gqa_parallel.errors import UserError


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm whose weight is the distance from one: ``x / rms(x) * (1 + weight)`` (Gemma, arXiv:2403.08295).

    It multiplies in fp32 or wider and rounds once: ``1 + weight`` in bf16 would lose the low bits of ``weight``.

    Args:
        hidden_size: components that are normalised together.
        eps: added to their mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * inverse_rms * (1 + self.weight.to(wide.dtype))).to(x.dtype)


class TorchNorm:
    """A spec's norm builder: RMSNorm or LayerNorm, as ``config.normalization`` says, of torch.

    With ``config.layernorm_zero_centered_gamma`` it is ``ZeroCenteredRMSNorm``.

    Unlike Megatron's ``WrappedTorchNorm`` it admits sequence parallelism: its parameters get Megatron's
    ``sequence_parallel`` tag, and ``sum_shared_gradients`` then sums their gradients.

    Raises:
        UserError: a LayerNorm is to be zero-centered.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused) -> nn.Module:
        builders = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
        if config.layernorm_zero_centered_gamma:
            if config.normalization != "RMSNorm":
                raise UserError(
                    f"normalization ({config.normalization!r}) must be 'RMSNorm' with layernorm_zero_centered_gamma "
                    "(True): only that norm has a zero-centered form here. Set layernorm_zero_centered_gamma=False."
                )
            builders["RMSNorm"] = ZeroCenteredRMSNorm
        norm = builders[config.normalization](hidden_size, eps=eps)
        norm.to(config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
