from collections.abc import Iterator

import pytest

from tests.distributed.ranks import RankPools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(world_size, tp_size)(function, *args)`` runs ``function`` on every rank of that layout."""
    import deepspeed  # noqa: F401 imported once, before the ranks are forked

    import gqa_parallel.megatron.self_attention  # noqa: F401

    pools = RankPools()
    yield pools
    pools.close()
