"""Angles of rotary position embedding: wavelengths, and the ways of stretching them to longer contexts."""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """Changes the angular frequencies of ``Rope``."""

    attention_factor: float
    """Factor on sine and cosine."""

    def __call__(self, frequencies_F: Tensor, theta: float, seq_len: int) -> Tensor:
        """
        Args:
            frequencies_F: radians per position, fp32.
            theta: base of the wavelengths.
            seq_len: positions of this forward pass.
        Returns:
            The frequencies to use instead, [F].
        """


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (arXiv:2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def __call__(self, frequencies_F: Tensor, theta: float, seq_len: int) -> Tensor:
        return frequencies_F / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a ramp between (arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0

    def __call__(self, frequencies_F: Tensor, theta: float, seq_len: int) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies_F / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return kept * frequencies_F + (1 - kept) * frequencies_F / self.factor


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware: beyond the trained length the base grows with the sequence (arXiv:2309.00071, section 3.3)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0

    def __call__(self, frequencies_F: Tensor, theta: float, seq_len: int) -> Tensor:
        stretch = max(seq_len, self.original_max_position_embeddings) / self.original_max_position_embeddings
        rotary_dim = 2 * len(frequencies_F)
        growth = (self.factor * stretch - (self.factor - 1)) ** (rotary_dim / (rotary_dim - 2))
        return _frequencies(theta * growth, rotary_dim)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: interpolate what turns less than ``beta_slow`` times in the trained length, keep what turns more than
    ``beta_fast`` times, a ramp between (arXiv:2309.00071, section 3.4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.attention_factor is None:
            # DeepSeek's variant divides two of them; the paper's is the default
            both = self.mscale and self.mscale_all_dim
            above, below = (self.mscale, self.mscale_all_dim) if both else (1.0, 0.0)
            object.__setattr__(self, "attention_factor", self._temperature(above) / self._temperature(below))

    def _temperature(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def __call__(self, frequencies_F: Tensor, theta: float, seq_len: int) -> Tensor:
        rotary_dim = 2 * len(frequencies_F)

        def component(turns: float) -> float:
            """The (fractional) component that turns so often within the trained length."""
            wavelength = self.original_max_position_embeddings / (2 * math.pi * turns)
            return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = component(self.beta_fast), component(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        span = high - low if high != low else 0.001
        index_F = torch.arange(len(frequencies_F), dtype=torch.float32, device=frequencies_F.device)
        interpolated = ((index_F - low) / span).clamp(0, 1)
        return interpolated * frequencies_F / self.factor + (1 - interpolated) * frequencies_F


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864).

    Args:
        theta: base of the wavelengths.
        fraction: share of each head's components that turn; the first ones do.
        scaling: stretching to longer contexts; None: as trained.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """Factor on sine and cosine."""
        return self.scaling.attention_factor if self.scaling else 1.0

    def angles(
        self, head_dim: int, seq_len: int, interleaved: bool = False, device: torch.device | None = None
    ) -> Tensor:
        """
        Args:
            head_dim: H.
            seq_len: S, positions 0 to S - 1.
            interleaved: pair neighbouring components instead of the two halves.
        Returns:
            [S, R] in radians, fp32, R = fraction * H; each angle stands at both components of its pair.
        """
        return _angles(self, head_dim, seq_len, interleaved, device)


@functools.lru_cache(maxsize=16)  # all layers of a model share a few
def _angles(rope: Rope, head_dim: int, seq_len: int, interleaved: bool, device: torch.device | None) -> Tensor:
    frequencies_F = _frequencies(rope.theta, int(rope.fraction * head_dim))
    if rope.scaling is not None:
        frequencies_F = rope.scaling(frequencies_F, rope.theta, seq_len)
    angles_SF = torch.arange(seq_len, dtype=torch.float32)[:, None] * frequencies_F
    angles_SR = angles_SF.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles_SF, angles_SF), dim=-1)
    return angles_SR.to(device)


def _frequencies(theta: float, rotary_dim: int) -> Tensor:
    """Radians per position, [R / 2], fp32."""
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
