import pytest
import torch
from torch import nn

from gqa_parallel import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.norm import TorchNorm, ZeroCenteredRMSNorm


def config(**settings) -> GQATransformerConfig:
    return GQATransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=2, **settings)


def test_zero_centered_is_rms_norm_with_one_more():
    norm, plain = ZeroCenteredRMSNorm(7, eps=1e-3).double(), nn.RMSNorm(7, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    plain.weight.data = norm.weight.data + 1
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-13, atol=1e-13)


def test_zero_centered_rounds_once_in_bf16():
    norm = ZeroCenteredRMSNorm(7).bfloat16()
    norm.weight.data.fill_(2**-9)  # 1 + 2^-9 is not a bf16 number
    x = torch.linspace(-3, 5, 7).bfloat16()
    wide = x.float()
    expected = wide * torch.rsqrt(wide.square().mean() + norm.eps) * (1 + 2**-9)
    assert torch.equal(norm(x), expected.bfloat16())


@pytest.mark.parametrize(
    "settings, kind",
    [
        ({"normalization": "RMSNorm"}, nn.RMSNorm),
        ({"normalization": "LayerNorm"}, nn.LayerNorm),
        ({"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True}, ZeroCenteredRMSNorm),
    ],
)
def test_the_config_chooses(settings, kind):
    norm = TorchNorm(config(**settings, params_dtype=torch.float64), 5, eps=0.5)
    assert type(norm) is kind
    assert norm.eps == 0.5
    assert norm.weight.dtype == torch.float64
    assert norm.weight.sequence_parallel is False


def test_a_zero_centered_layer_norm_is_refused():
    with pytest.raises(UserError, match=r"normalization \('LayerNorm'\) must be 'RMSNorm' with layernorm_zero_center"):
        TorchNorm(config(normalization="LayerNorm", layernorm_zero_centered_gamma=True), 5)
