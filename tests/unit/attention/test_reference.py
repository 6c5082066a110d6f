"""The oracle has an oracle: Hugging Face's Llama attention, and Qwen3's with QK-norm."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from gqa_parallel.attention.reference import DenseGroupedQueryAttention
from gqa_parallel.attention.rotary import Rotation

S, B, D, H = 7, 3, 20, 6


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("family", "attention"), [(LlamaConfig, LlamaAttention), (Qwen3Config, Qwen3Attention)])
def test_equals_hugging_face(family, attention, kv_heads):
    torch.manual_seed(kv_heads)
    config = family(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=H,
        attn_implementation="sdpa",
        rms_norm_eps=1e-5,
    )
    theirs = attention(config, layer_idx=0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.4)
    has_norm = hasattr(theirs, "q_norm")
    ours = DenseGroupedQueryAttention(D, 4, kv_heads, H, qk_norm_eps=1e-5 if has_norm else None).double()
    ours.load_state_dict(theirs.state_dict())

    hidden = torch.randn(S, B, D, dtype=torch.float64)
    angles = torch.randn(S, H // 2, dtype=torch.float64).repeat(1, 2)
    causal = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected, _ = theirs(
        hidden.transpose(0, 1),
        position_embeddings=(angles.cos()[None], angles.sin()[None]),
        attention_mask=causal,
    )
    # Hugging Face's RMSNorm passes through float32
    tolerance = 1e-6 if has_norm else 1e-12
    torch.testing.assert_close(ours(hidden, Rotation(angles)), expected.transpose(0, 1), rtol=tolerance, atol=tolerance)
