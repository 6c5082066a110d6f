"""A resumed run is the run that was never interrupted: to the bit in the same layout, up to rounding in any other."""

import re

import pytest

from tests.distributed.ranks import RankError
from tests.distributed.resumed_runs import resume_and_train_on, rounded_masters, save_and_train_on

BEFORE, AFTER = 10, 10
# fp32 rounding, about 1e-7 a step, over 20 clipped AdamW steps
TOLERANCE = 1e-5
# tp, dp, ZeRO stage; G = 2, so tp = 4 replicates both KV heads
LAYOUTS = [(1, 1, 0), (2, 1, 1), (1, 2, 2), (2, 2, 3), (4, 1, 1)]
UNEVEN = ["model.num_heads=10", "model.num_kv_heads=5"]
FC1 = "weight/decoder.layers.0.mlp.linear_fc1.weight"
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]


def settings(stage: int, precision: str = "fp32") -> list[str]:
    return [f"zero.stage={stage}", f"train.precision={precision}"]


def name(layout: tuple[int, int, int]) -> str:
    return "tp{}-dp{}-zero{}".format(*layout)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), *((precision, stage) for precision in ("fp32", "bf16") for stage in (1, 2, 3))],
)
def test_same_layout_to_the_bit(ranks, tmp_path, precision, stage):
    """Losses, weights, moments and random streams."""
    overrides = [*settings(stage, precision), *DROPOUT]
    straight = ranks(4, 2)(save_and_train_on, tmp_path, overrides, BEFORE, AFTER)
    resumed = ranks(4, 2)(resume_and_train_on, tmp_path, overrides, AFTER)
    assert len(set(straight[0]["losses"])) == BEFORE + AFTER
    for before, after in zip(straight, resumed, strict=True):
        assert after["losses"] == before["losses"][BEFORE:]
        assert after["digest"] == before["digest"]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> dict:
    """A run of each layout, and the losses of all its steps."""
    found = {}
    for layout in LAYOUTS:
        tp_size, dp_size, stage = layout
        folder = tmp_path_factory.mktemp(name(layout))
        run, *_ = ranks(tp_size * dp_size, tp_size)(save_and_train_on, folder, settings(stage), BEFORE, AFTER)
        found[layout] = folder, run["losses"]
    return found


@pytest.mark.parametrize("here", LAYOUTS, ids=name)
@pytest.mark.parametrize("there", LAYOUTS, ids=name)
def test_another_layout(ranks, saved, there, here):
    if here == there:
        return
    folder, losses = saved[there]
    tp_size, dp_size, stage = here
    for run in ranks(tp_size * dp_size, tp_size)(resume_and_train_on, folder, settings(stage), AFTER):
        assert run["losses"] == pytest.approx(losses[BEFORE:], rel=TOLERANCE)


def test_an_uneven_layout(ranks, tmp_path):
    """5 KV heads over 2 ranks, then over 3, which pad the 257 tokens of the vocabulary differently."""
    straight, *_ = ranks(2)(save_and_train_on, tmp_path, [*settings(1), *UNEVEN], BEFORE, AFTER)
    for run in ranks(3)(resume_and_train_on, tmp_path, [*settings(3), *UNEVEN], AFTER):
        assert run["losses"] == pytest.approx(straight["losses"][BEFORE:], rel=TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_are_the_rounded_fp32_values(ranks, saved, stage):
    folder, _ = saved[(1, 1, 0)]
    assert all(ranks(2, 1)(rounded_masters, folder, settings(stage, "bf16")))


def test_weights_that_do_not_fit_are_refused_on_every_rank(ranks, saved):
    """A description that says otherwise: the tensors are looked at too."""
    folder, _ = saved[(2, 1, 1)]
    with pytest.raises(RankError) as error:
        ranks(2)(resume_and_train_on, folder, [*settings(1), "model.ffn_hidden_size=64"], AFTER)
    said = re.findall(r"the shape of (\S+) is (\[.*?\]), not (\[.*?\])", str(error.value))
    assert len(said) >= 2 and set(said) == {(FC1, "[192, 45]", "[128, 45]")}
