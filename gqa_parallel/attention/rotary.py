"""Rotary position embedding (RoPE, arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotate(x: Tensor, angles_SR: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first ``R`` components of every head by its position's angles; the others pass through.

    Args:
        x: [S, B, heads, H] queries or keys.
        angles_SR: [S, R], R <= H, radians; each angle appears twice, in the halves (or, interleaved, side by side).
        interleaved: pair neighbouring components (GPT-J) instead of the two halves (GPT-NeoX, Llama).
    Returns:
        [S, B, heads, H], a view of memory laid out as [B, heads, S, H]: fused attention kernels read that fastest.
    """
    rotary_dim = angles_SR.shape[-1]
    x_BNSH = x.permute(1, 2, 0, 3)
    x_rotary, x_pass = x_BNSH[..., :rotary_dim], x_BNSH[..., rotary_dim:]
    cos_SR, sin_SR = angles_SR.cos().to(x.dtype), angles_SR.sin().to(x.dtype)
    rotated = x_rotary * cos_SR + _quarter_turn(x_rotary, interleaved) * sin_SR
    if x_pass.shape[-1]:
        rotated = torch.cat((rotated, x_pass), dim=-1)
    return rotated.contiguous().permute(2, 0, 1, 3)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((-odd, even), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
