"""Which samples each data-parallel rank reads. No torch here: ``gqa-plan`` asks too."""

from collections.abc import Iterator

from gqa_parallel.errors import UserError


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Forward passes of one rank per optimizer step.

    Raises:
        UserError: the global batch is not a whole number of micro-batches on every rank.
    """
    sequences = micro_batch_size * dp_size
    if global_batch_size < 1 or global_batch_size % sequences:
        below = global_batch_size // sequences * sequences
        near = [str(size) for size in (below, below + sequences) if size > 0]
        raise UserError(
            f"train.global_batch_size ({global_batch_size}) must be a multiple of train.micro_batch_size "
            f"({micro_batch_size}) * data-parallel size ({dp_size}): every rank runs the same number of "
            f"micro-batches. Use train.global_batch_size={' or '.join(near)}."
        )
    return global_batch_size // sequences


class GlobalBatchSampler:
    """Micro-batches of sample indices for one data-parallel rank; a ``batch_sampler`` of a torch DataLoader.

    Optimizer step ``k`` reads the samples ``[k * global_batch_size, (k + 1) * global_batch_size)``, whatever
    the number of ranks and the micro-batch size. Its micro-batch ``m`` is the next
    ``micro_batch_size * dp_size`` of them, of which rank ``r`` takes the ``r``-th part. An incomplete global
    batch at the end is left out.

    Args:
        num_samples: length of the dataset.
        global_batch_size: samples per optimizer step, over all ranks.
        micro_batch_size: samples per rank and forward pass.
        dp_rank: this rank among those that read different data.
        dp_size: number of such ranks.
        consumed_samples: samples that earlier steps have read, over all ranks; iteration goes on from there.
    Raises:
        UserError: see ``micro_batches_per_step``.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
    ) -> None:
        self.micro_batches = micro_batches_per_step(global_batch_size, micro_batch_size, dp_size)
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.consumed_samples = consumed_samples

    def __len__(self) -> int:
        """Micro-batches of this rank from ``consumed_samples`` to the end."""
        remaining = max(0, self.num_samples - self.consumed_samples)
        return remaining // self.global_batch_size * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed_samples + self.dp_rank * self.micro_batch_size
        for micro_batch in range(len(self)):
            start = first + micro_batch * self.dp_size * self.micro_batch_size
            yield list(range(start, start + self.micro_batch_size))
