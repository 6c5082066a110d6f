"""Stopping in an orderly way: SIGTERM (a scheduler's warning) or Ctrl-C ends the run at the next logged step."""

import signal
from types import FrameType

import torch


class StopSignal:
    """Remembers that the process was asked to stop, while the context lasts. A second Ctrl-C kills as usual.

    A second SIGTERM does not: one warning may come both from the scheduler and through torchrun, and whoever is
    out of patience sends SIGKILL.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def as_tensor(self, device: torch.device) -> torch.Tensor:
        """1 if a signal came, else 0: the ranks must agree, as it reaches them at different steps."""
        return torch.tensor(float(self.received), device=device)
