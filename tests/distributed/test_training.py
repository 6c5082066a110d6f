"""Training is the same in every layout, and the copies of shared parameters stay equal."""

import pytest

from tests.distributed.training_runs import train

STEPS = 20
# (tp, dp, ZeRO stage): G = 2, so tp = 4 replicates KV heads
LAYOUTS = [(2, 1, 1), (1, 2, 1), (2, 2, 2), (2, 2, 3), (4, 1, 1)]
# fp32 rounding, 1e-7 a step, over 20 clipped AdamW steps
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_rank(ranks):
    (run,) = ranks(1, 1)(train, 0, STEPS)
    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids="tp{0[0]}-dp{0[1]}-zero{0[2]}".format)
def test_same_losses_and_norms(ranks, one_rank, layout):
    tp_size, dp_size, stage = layout
    assert one_rank["losses"][-1] < 0.8 * one_rank["losses"][0], "it must learn, or equality says little"
    assert max(one_rank["norms"]) > 0.5, "clipping must be at work"
    for run in ranks(tp_size * dp_size, tp_size)(train, stage, STEPS):
        assert run["losses"] == pytest.approx(one_rank["losses"], rel=TOLERANCE)
        assert run["norms"] == pytest.approx(one_rank["norms"], rel=TOLERANCE)
        assert run["differing"] == []
