"""The place of this process among the others, as torchrun tells it. Needs no torch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """
    Attributes:
        rank: of this process, from 0.
        size: processes of the run.
        local_rank: of this process on its node; the index of its GPU.
    """

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def from_environment() -> "World":
        """What torchrun set; a process started without it is alone."""
        return World(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        )
