"""Which rank holds which heads: the one rule of tensor-parallel grouped-query attention.

Attention has ``H`` query heads and ``G`` KV heads; query head ``i`` uses KV head ``i // (H/G)``
(arXiv:2305.13245). A KV head together with its ``H/G`` query heads is a *group*. ``T`` ranks share the heads:

* ``T <= G``: a rank holds whole, consecutive groups; if ``T`` does not divide ``G``, the first ranks hold one more.
* ``T > G``: a rank holds one whole KV head, together with the other *replicas* of that head (consecutive ranks,
  the first heads have one more), and an even slice of the group's query heads (the first replicas hold one more).

Every ``(H, G, T)`` with ``G | H`` and ``T <= H`` is admitted. No KV head is ever cut, no rank is idle, and on each
rank the query heads divide evenly over the KV heads.
"""

from dataclasses import dataclass

from gqa_parallel.errors import UserError, one_of


def even_split(total: int, parts: int, index: int) -> range:
    """The ``index``-th of ``parts`` consecutive shares of ``range(total)``; larger shares come first."""
    share, larger = divmod(total, parts)
    start = index * share + min(index, larger)
    return range(start, start + share + (index < larger))


@dataclass(frozen=True)
class HeadPartition:
    """The heads of each tensor-parallel rank.

    Args:
        num_heads: query heads of the whole layer, ``H``.
        num_kv_heads: KV heads of the whole layer, ``G``; divides ``num_heads``.
        tp_size: tensor-parallel ranks, ``T``.

    Raises:
        UserError: the numbers admit no partition; the message names those that do.

    Example: ``HeadPartition(num_heads=8, num_kv_heads=2, tp_size=4)`` gives rank 1 the query heads 2 and 3 and
    KV head 0, which rank 0 holds too.
    """

    num_heads: int
    num_kv_heads: int
    tp_size: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "tp_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} ({value!r}) must be a whole number of at least 1.")
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise UserError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}): "
                f"the query heads of a group share one KV head. Use num_kv_heads {one_of(divisors)}."
            )
        if self.tp_size > self.num_heads:
            raise UserError(
                f"tp ({self.tp_size}) must be at most num_heads ({self.num_heads}): "
                f"a rank without a query head would be idle. Use tp {self.num_heads} or less."
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head, ``H/G``."""
        return self.num_heads // self.num_kv_heads

    @property
    def replicates_kv(self) -> bool:
        """Whether some KV head is held by several ranks."""
        return self.tp_size > self.num_kv_heads

    def query_heads(self, rank: int) -> range:
        """Global indices of the query heads of ``rank``."""
        kv_heads = self.kv_heads(rank)
        first = kv_heads.start * self.heads_per_group
        if not self.replicates_kv:
            return range(first, kv_heads.stop * self.heads_per_group)
        replicas = self.kv_replica_ranks(rank)
        share = even_split(self.heads_per_group, len(replicas), rank - replicas.start)
        return range(first + share.start, first + share.stop)

    def kv_heads(self, rank: int) -> range:
        """Global indices of the KV heads of ``rank``."""
        self._check(rank)
        if not self.replicates_kv:
            return even_split(self.num_kv_heads, self.tp_size, rank)
        head = next(g for g in range(self.num_kv_heads) if rank in self._holders(g))
        return range(head, head + 1)

    def kv_replica_ranks(self, rank: int) -> range:
        """TP ranks that hold the same KV heads as ``rank``, itself included."""
        self._check(rank)
        if not self.replicates_kv:
            return range(rank, rank + 1)
        return self._holders(self.kv_heads(rank).start)

    @property
    def imbalance(self) -> float:
        """Query heads of the fullest rank over the mean: what attention waits for. 1.0 is even."""
        return max(len(self.query_heads(rank)) for rank in range(self.tp_size)) * self.tp_size / self.num_heads

    def _holders(self, kv_head: int) -> range:
        """Ranks that hold ``kv_head`` when KV heads are replicated."""
        return even_split(self.tp_size, self.num_kv_heads, kv_head)

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.tp_size:
            raise IndexError(f"rank ({rank}) must be in 0..{self.tp_size - 1}, the ranks of tp ({self.tp_size}).")
