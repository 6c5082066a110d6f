"""Pooled KV heads against formulas written here, and against Hugging Face's models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from gqa_parallel.checkpoint.conversion import pooled_tensors
from gqa_parallel.checkpoint.huggingface import family_of, model_arguments
from gqa_parallel.checkpoint.kv_pooling import POOLINGS, pool_kv_heads
from gqa_parallel.checkpoint.lazy_tensor import LazyTensor
from gqa_parallel.errors import UserError

HEAD_DIM, WIDTH = 3, 5
SMALL = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "initializer_range": 0.3,
}


@st.composite
def weights(draw):
    """A weight or bias of KV heads, with the numbers of heads before and after."""
    new, ratio = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = (new * ratio * HEAD_DIM, *draw(st.sampled_from([(), (WIDTH,)])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return torch.randn(shape, generator=generator).to(dtype), new * ratio, new


@given(weights())
def test_mean_of_neighbours_component_by_component(case):
    weight, old, new = case
    pooled = pool_kv_heads(weight, old, new, "mean")
    assert pooled.dtype == weight.dtype and pooled.shape == (new * HEAD_DIM, *weight.shape[1:])
    ratio = old // new
    for head in range(new):
        for component in range(HEAD_DIM):
            rows = [weight[(head * ratio + member) * HEAD_DIM + component].double() for member in range(ratio)]
            expected = sum(rows) / ratio
            # one rounding to the weight's dtype, and fp32 sums of at most four values
            tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[weight.dtype]
            actual = pooled[head * HEAD_DIM + component].double()
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-6 if ratio > 1 else 0)


@given(weights())
def test_first_takes_the_heads_at_the_start_of_each_group(case):
    weight, old, new = case
    pooled = pool_kv_heads(weight, old, new, "first")
    kept = [head * (old // new) for head in range(new)]
    rows = [head * HEAD_DIM + component for head in kept for component in range(HEAD_DIM)]
    assert torch.equal(pooled, weight[rows])


@given(weights(), st.sampled_from(list(POOLINGS)))
def test_as_many_heads_are_the_same_heads(case, pooling):
    weight, old, _ = case
    pooled = pool_kv_heads(weight, old, old, pooling)
    assert torch.equal(pooled, weight) and pooled.data_ptr() != weight.data_ptr()


@given(weights())
def test_pooling_twice_is_pooling_once(case):
    weight, old, new = case
    if weight.dtype is torch.float64:
        twice = pool_kv_heads(pool_kv_heads(weight, old, new, "mean"), new, 1, "mean")
        torch.testing.assert_close(twice, pool_kv_heads(weight, old, 1, "mean"), rtol=1e-12, atol=1e-12)


def test_random_has_the_spread_of_the_original_and_a_seed():
    weight = torch.randn(8 * 64, 200) * 0.37
    draws = [pool_kv_heads(weight, 8, 2, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # 25,600 values: their standard deviation is within 2 % (4.5 sigma)
    assert draws[0].std().item() == pytest.approx(0.37, rel=0.02)
    assert abs(draws[0].mean().item()) < 0.37 * 0.03


def test_what_cannot_be_pooled():
    weight = torch.zeros(6 * HEAD_DIM, WIDTH)
    with pytest.raises(UserError, match=r"num_kv_heads \(4\) must divide the model's num_kv_heads \(6\)"):
        pool_kv_heads(weight, 6, 4, "mean")
    with pytest.raises(UserError, match=r"Use num_kv_heads=1, 2, 3 or 6\."):
        pool_kv_heads(weight, 6, 0, "mean")
    with pytest.raises(UserError, match=r"pooling \(max\) must be one of mean, first, random"):
        pool_kv_heads(weight, 6, 2, "max")


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "granite"])
def test_equal_heads_within_groups_give_the_same_logits(model_type, new, pooling):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    family, config = family_of(model.config), model_arguments(model.config).config
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        for heads in kv_heads(name, tensor):
            for head, rows in enumerate(heads):
                rows.copy_(heads[head // (4 // new) * (4 // new)])
    model.load_state_dict(state)

    lazy = {name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.__getitem__) for name, tensor in state.items()}
    pooled = pooled_tensors(lazy, family, config, new, pooling, seed=0)
    smaller = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SMALL | {"num_key_value_heads": new})
    ).double()
    smaller.load_state_dict({name: tensor[(slice(None),)] for name, tensor in pooled.items()})
    tokens = torch.randint(SMALL["vocab_size"], (2, 9))
    # the same computation on the same values; RMSNorm is in fp32 whatever the weights are
    torch.testing.assert_close(smaller(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)


def kv_heads(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of the K heads and of the V heads of an MHA model, [head, head_dim, ...], as far as a tensor holds them."""
    heads = SMALL["num_attention_heads"]
    if "qkv_proj" in name:
        return list(tensor.unflatten(0, (3, heads, -1))[1:])
    return [tensor.unflatten(0, (heads, -1))] if "k_proj" in name or "v_proj" in name else []
