"""Models with a ``GPTVariant`` train alike in every layout: norms and multipliers under ZeRO and recomputation."""

import pytest

from gqa_parallel.megatron.variant import GPTVariant
from tests.distributed.training_runs import train

STEPS = 6
TOLERANCE = 1e-5  # as in test_training: fp32 rounding over clipped AdamW steps
GEMMA = (
    GPTVariant(embedding_multiplier=20**0.5, post_norms=True, logit_softcap=4.0),
    {"layernorm_zero_centered_gamma": True, "attention_softcap": 3.0},
)
GRANITE = (
    GPTVariant(embedding_multiplier=3.0, residual_multiplier=0.4, logit_multiplier=0.6),
    {"softmax_scale": 0.3, "add_bias_linear": True},
)
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    "family, world_size, tp_size, stage, settings",
    [
        (GEMMA, 4, 4, 3, {"sequence_parallel": True}),
        (GEMMA, 4, 2, 3, RECOMPUTE),
        (GRANITE, 3, 3, 2, {"sequence_parallel": True}),
    ],
    ids=["gemma", "gemma, recompute layers", "granite"],
)
def test_same_losses_and_norms(ranks, family, world_size, tp_size, stage, settings):
    variant, family_settings = family
    (expected,) = ranks(1, 1)(train, 0, STEPS, family_settings, "fp32", True, variant)
    for run in ranks(world_size, tp_size)(train, stage, STEPS, family_settings | settings, "fp32", True, variant):
        assert run["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
        assert run["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
        assert run["differing"] == []
