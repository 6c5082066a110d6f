import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from gqa_parallel.attention.rotary import Rotation

S, B, N, H = 7, 2, 3, 10


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [H, 4])
def test_equals_megatrons(interleaved, rotary_dim):
    torch.manual_seed(0)
    x = torch.randn(S, B, N, H, dtype=torch.float64)
    half = torch.randn(S, rotary_dim // 2, dtype=torch.float64)
    angles = half.repeat_interleave(2, dim=-1) if interleaved else torch.cat((half, half), dim=-1)
    expected = _apply_rotary_pos_emb_bshd(x, angles[:, None, None], rotary_interleaved=interleaved)
    torch.testing.assert_close(Rotation(angles, interleaved)(x), expected, rtol=1e-14, atol=1e-14)


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, H, dtype=torch.float64)
    frequencies = torch.rand(H // 2, dtype=torch.float64)

    def turned(x, position):
        angles = position * torch.cat((frequencies, frequencies))
        return Rotation(angles[None])(x).flatten()

    assert turned(q, 5) @ turned(k, 2) == pytest.approx((turned(q, 11) @ turned(k, 8)).item(), rel=1e-12)


def test_memory_is_laid_out_by_heads():
    rotated = Rotation(torch.randn(S, H))(torch.randn(S, B, N, H))
    assert rotated.shape == (S, B, N, H)
    assert rotated.permute(1, 2, 0, 3).is_contiguous()


def test_half_precision_is_kept():
    assert Rotation(torch.randn(S, H))(torch.randn(S, B, N, H, dtype=torch.bfloat16)).dtype == torch.bfloat16
