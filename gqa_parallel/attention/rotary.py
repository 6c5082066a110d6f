"""Turning queries and keys by the angles of their positions (RoPE, arXiv:2104.09864)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The turn of every position, computed once for queries and keys.

    Args:
        angles_SR: [S, R] radians, R <= H; each angle appears at both components of its pair.
        interleaved: a pair is two neighbours (GPT-J), not one component of each half (GPT-NeoX, Llama).
        factor: on sine and cosine (YaRN's attention factor).
    """

    angles_SR: Tensor
    interleaved: bool = False
    factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cos_SR", self.factor * self.angles_SR.cos())
        object.__setattr__(self, "sin_SR", self.factor * self.angles_SR.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """Turn the first ``R`` components of every head; the others pass through.

        Args:
            x: [S, B, heads, H] queries or keys.
        Returns:
            [S, B, heads, H], a view of memory laid out as [B, heads, S, H]: fused kernels read that fastest.
        """
        rotary_dim = self.angles_SR.shape[-1]
        x_BNSH = x.permute(1, 2, 0, 3)
        x_rotary, x_pass = x_BNSH[..., :rotary_dim], x_BNSH[..., rotary_dim:]
        rotated = x_rotary * self.cos_SR.to(x.dtype) + self._quarter_turn(x_rotary) * self.sin_SR.to(x.dtype)
        if x_pass.shape[-1]:
            rotated = torch.cat((rotated, x_pass), dim=-1)
        return rotated.contiguous().permute(2, 0, 1, 3)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        if self.interleaved:
            even, odd = x[..., ::2], x[..., 1::2]
            return torch.stack((-odd, even), dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
