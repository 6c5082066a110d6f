import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_parallel.data.sampler import GlobalBatchSampler, micro_batches_per_step
from gqa_parallel.errors import UserError

SMALL = st.integers(1, 5)


@given(
    dp_size=SMALL,
    micro_batch_size=SMALL,
    micro_batches=SMALL,
    consumed_steps=st.integers(0, 4),
    extra=st.integers(0, 97),
)
def test_a_step_reads_its_global_batch_and_nothing_else(
    dp_size, micro_batch_size, micro_batches, consumed_steps, extra
):
    size = dp_size * micro_batch_size * micro_batches
    consumed, num_samples = consumed_steps * size, consumed_steps * size + extra
    ranks = [
        list(GlobalBatchSampler(num_samples, size, micro_batch_size, rank, dp_size, consumed))
        for rank in range(dp_size)
    ]
    steps = extra // size
    assert {len(batches) for batches in ranks} == {steps * micro_batches}
    for step in range(steps):
        mine = slice(step * micro_batches, (step + 1) * micro_batches)
        read = [sample for batches in ranks for batch in batches[mine] for sample in batch]
        assert sorted(read) == list(range(consumed + step * size, consumed + (step + 1) * size))


@given(dp_size=SMALL, micro_batch_size=SMALL, micro_batches=SMALL, consumed_steps=st.integers(0, 7))
def test_resuming_goes_on_where_it_stopped(dp_size, micro_batch_size, micro_batches, consumed_steps):
    size = dp_size * micro_batch_size * micro_batches
    whole = GlobalBatchSampler(7 * size + 1, size, micro_batch_size, dp_size - 1, dp_size)
    rest = GlobalBatchSampler(7 * size + 1, size, micro_batch_size, dp_size - 1, dp_size, consumed_steps * size)
    assert list(rest) == list(whole)[consumed_steps * micro_batches :]
    assert len(rest) == len(list(rest))


def test_micro_batches_of_a_rank():
    assert list(GlobalBatchSampler(13, 12, 2, dp_rank=1, dp_size=3)) == [[2, 3], [8, 9]]


def test_micro_batches_per_step():
    assert micro_batches_per_step(30, 3, 5) == 2


@pytest.mark.parametrize(("size", "near"), [(31, "30 or 45"), (7, "15"), (0, "15")])
def test_an_uneven_global_batch_names_all_three_and_what_works(size, near):
    with pytest.raises(UserError) as error:
        micro_batches_per_step(size, 3, 5)
    assert str(error.value) == (
        f"train.global_batch_size ({size}) must be a multiple of train.micro_batch_size (3) * data-parallel "
        f"size (5): every rank runs the same number of micro-batches. Use train.global_batch_size={near}."
    )


def test_no_torch_is_needed():
    program = "import gqa_parallel.data.sampler, gqa_parallel.data.index, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
