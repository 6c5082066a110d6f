"""Tensors that are read in part, when they are asked for, and those that are made of parts of others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20

Index = tuple[slice, ...]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor somewhere.

    Args:
        shape: at least one dimension.
        dtype: of what is read.
        read: gives a block, a slice without steps for each of the first dimensions.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Index], Tensor]

    def __getitem__(self, index: Index) -> Tensor:
        return self.read(index)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """The whole in blocks of consecutive rows, each with its first row.

        Args:
            max_bytes: of a block; one row is read at least.
        """
        row_bytes = self.num_bytes // max(self.shape[0], 1)
        num_rows = max(1, max_bytes // max(row_bytes, 1))
        for start in range(0, self.shape[0], num_rows):
            yield start, self[(slice(start, min(start + num_rows, self.shape[0])),)]


def stack_rows(pieces: Sequence[tuple[LazyTensor, range]]) -> LazyTensor:
    """Rows of tensors, one below the other.

    Args:
        pieces: consecutive rows of tensors that are alike in dtype and all other dimensions.
    """
    first, rows = pieces[0]
    if len(pieces) == 1 and rows == range(first.shape[0]):
        return first

    def read(index: Index) -> Tensor:
        size = sum(len(rows) for _, rows in pieces)
        wanted = range(size)[index[0]]
        parts, offset = [], 0
        for tensor, rows in pieces:
            start, stop = max(wanted.start - offset, 0), min(wanted.stop - offset, len(rows))
            if start < stop:
                parts.append(tensor[(slice(rows[start], rows[stop - 1] + 1), *index[1:])])
            offset += len(rows)
        return torch.cat(parts)

    return LazyTensor((sum(len(rows) for _, rows in pieces), *first.shape[1:]), first.dtype, read)
