"""Frequencies and factors equal those of Hugging Face's own functions."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gqa_parallel.attention.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling

HEAD_DIM, THETA, TRAINED = 22, 5000.0, 64

SCALINGS = {
    "linear": (LinearScaling(3.0), {"factor": 3.0}),
    "llama3": (
        Llama3Scaling(8.0, 1.0, 4.0, TRAINED),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED},
    ),
    "dynamic": (DynamicScaling(2.0, TRAINED), {"factor": 2.0}),
    "yarn": (YarnScaling(4.0, TRAINED), {"factor": 4.0, "original_max_position_embeddings": TRAINED}),
}
YARN = {
    "betas": {"beta_fast": 20.0, "beta_slow": 2.0},
    "attention factor": {"attention_factor": 0.8},
    "mscale": {"mscale": 0.7, "mscale_all_dim": 0.3},
    "not truncated": {"truncate": False},
}


def theirs(kind: str, parameters: dict, seq_len: int) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=TRAINED if kind == "dynamic" else 4 * TRAINED,
        rope_parameters={"rope_type": kind, "rope_theta": THETA, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)


def check(rope: Rope, kind: str, parameters: dict, seq_len: int) -> None:
    expected, factor = theirs(kind, parameters, seq_len)
    angles = rope.angles(HEAD_DIM, seq_len)
    assert angles.shape == (seq_len, HEAD_DIM)
    torch.testing.assert_close(angles[1, : HEAD_DIM // 2], expected, rtol=2e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("seq_len", [TRAINED // 2, 3 * TRAINED])
@pytest.mark.parametrize("kind", SCALINGS)
def test_equals_hugging_face(kind, seq_len):
    scaling, parameters = SCALINGS[kind]
    check(Rope(THETA, scaling=scaling), kind, parameters, seq_len)


@pytest.mark.parametrize("case", YARN)
def test_yarns_options(case):
    options = YARN[case]
    parameters = {**SCALINGS["yarn"][1], **options}
    check(Rope(THETA, scaling=YarnScaling(4.0, TRAINED, **options)), "yarn", parameters, TRAINED)


def test_unscaled_angles():
    angles = Rope(theta=100.0).angles(head_dim=4, seq_len=3)
    turns = torch.tensor([1.0, 0.1])  # 100^0, 100^(-1/2)
    expected = torch.arange(3.0)[:, None] * torch.cat((turns, turns))
    torch.testing.assert_close(angles, expected)
    neighbours = Rope(theta=100.0).angles(head_dim=4, seq_len=3, interleaved=True)
    torch.testing.assert_close(neighbours, expected[:, [0, 2, 1, 3]])


def test_a_fraction_of_the_components_turns():
    assert Rope(fraction=0.5).angles(head_dim=12, seq_len=2).shape == (2, 6)
