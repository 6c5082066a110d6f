"""The numbers of a training step: bits per byte, throughput, model FLOP/s utilisation, memory, time left."""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Dense bf16 peak of one device in FLOP/s, by a part of its CUDA name, the more specific names first. NVIDIA's
# sheets give some peaks with 2:4 sparsity; those are halved here. MIG slices have no entry.
PEAK_BF16_FLOPS = (
    ("GB200", 2500e12),  # GB200 NVL72 product page, 360 PFLOP/s with sparsity for 72
    ("B200", 2250e12),  # HGX B200 data sheet
    ("GH200", 989e12),  # GH200 Grace Hopper data sheet
    ("H200 NVL", 835e12),  # H200 data sheet
    ("H200", 989e12),  # H200 data sheet (SXM)
    ("H100 PCIe", 756e12),  # H100 data sheet, 2022
    ("H100 NVL", 835e12),  # H100 data sheet
    ("H100 80GB HBM3", 989e12),  # H100 data sheet (SXM)
    ("A100", 312e12),  # A100 data sheet
    ("L40S", 362e12),  # L40S data sheet
)


def bits_per_byte(loss: float) -> float:
    """Cross-entropy of a byte-level model, nats per byte, as bits per byte."""
    return loss / math.log(2)


def perplexity(loss: float) -> float:
    """``exp(loss)``, for a loss in nats per token; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def loss_metrics(prefix: str, loss: float, byte_level: bool) -> dict[str, float]:
    """A loss and its readable form, under the names that are logged.

    Args:
        prefix: ``train`` or ``val``.
        loss: mean cross-entropy, nats per token.
        byte_level: whether a token is a byte. Then bits per byte is exact; else perplexity is given, which
            only compares models of the same tokenizer.

    Returns:
        ``PREFIX/loss`` with ``PREFIX/bits_per_byte`` or ``PREFIX/perplexity``.
    """
    if byte_level:
        return {f"{prefix}/loss": loss, f"{prefix}/bits_per_byte": bits_per_byte(loss)}
    return {f"{prefix}/loss": loss, f"{prefix}/perplexity": perplexity(loss)}


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, FLOP/s.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.

    Returns:
        The data sheet's number; None for a device not in ``PEAK_BF16_FLOPS`` or a MIG slice.
    """
    if "MIG" in device_name:
        return None
    return next((peak for name, peak in PEAK_BF16_FLOPS if name in device_name), None)


def this_device_peak_flops() -> float | None:
    """``peak_bf16_flops`` of the current CUDA device; None on the CPU."""
    return peak_bf16_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_memory_gib() -> float:
    """Peak memory of this process so far, GiB: tensors on the CUDA device, else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Throughput:
    """Rates of optimizer steps, smoothed over about the last ten updates.

    Args:
        tokens_per_step: tokens of the global batch.
        flops_per_step: model FLOPs of the global batch, forward and backward, without recomputation.
        num_devices: devices that share the step.
        peak_flops: dense peak of one device, FLOP/s; None where unknown, which leaves ``perf/mfu`` out.
        smoothing: weight of the past in the moving average, in [0, 1).
        clock: seconds, monotonic.

    The clock starts at construction. The first update, which holds warm-up, weighs nothing once
    there is a second.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_step: float,
        num_devices: int,
        peak_flops: float | None = None,
        smoothing: float = 0.9,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_step
        self._num_devices = num_devices
        self._peak_flops = peak_flops
        self._smoothing = smoothing
        self._clock = clock
        self._mark = clock()
        self._updates = 0
        self._steps = 0
        self._seconds = 0.0
        self._smooth_step_s = math.nan

    def update(self, steps: int = 1) -> dict[str, float]:
        """Count ``steps`` as done since the last update.

        Returns:
            ``perf/step_s`` (seconds, of these steps alone), and smoothed ``perf/tokens_per_s`` (all devices),
            ``perf/tflops`` (TFLOP/s per device) and, where the peak is known, ``perf/mfu`` in [0, 1]
            (arXiv:2204.02311, appendix B).
        """
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        self._seconds += elapsed
        self._steps += steps
        self._updates += 1
        step_s = elapsed / steps
        if self._updates <= 2:
            self._smooth_step_s = step_s
        else:
            self._smooth_step_s += (1 - self._smoothing) * (step_s - self._smooth_step_s)
        flops_per_s = self._flops_per_step / self._smooth_step_s / self._num_devices
        metrics = {
            "perf/step_s": step_s,
            "perf/tokens_per_s": self._tokens_per_step / self._smooth_step_s,
            "perf/tflops": flops_per_s / 1e12,
        }
        if self._peak_flops is not None:
            metrics["perf/mfu"] = flops_per_s / self._peak_flops
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside: validation, checkpoints."""
        start = self._clock()
        try:
            yield
        finally:
            self._mark += self._clock() - start

    def eta_s(self, steps_left: int) -> float:
        """Seconds that ``steps_left`` take at the smoothed rate; NaN before the first update."""
        return steps_left * self._smooth_step_s

    @property
    def mean_tokens_per_s(self) -> float:
        """Over all steps counted so far, all devices, warm-up included; NaN before the first update."""
        return self._steps * self._tokens_per_step / self._seconds if self._steps else math.nan
