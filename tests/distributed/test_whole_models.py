"""Whole models: the cost model counts what is built, and packed documents do not see each other."""

import pytest
import torch

from tests.distributed.whole_models import counted_and_built, losses_of_isolated_documents

VARIANTS = {
    "default": [],
    "gelu, biases, layernorm": ["model.activation=gelu", "model.linear_bias=true", "model.normalization=layernorm"],
    "gate, sinks, post norms": ["model.output_gate=true", "model.sinks=true", "model.post_norms=true"],
    "untied, qkv bias": ["model.tie_embeddings=false", "model.qkv_bias=true", "model.qk_norm=false"],
    "MQA": ["model.num_kv_heads=1"],
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tp_size", [1, 3, 4])
def test_the_cost_model_counts_what_is_built(ranks, tp_size, name):
    for counted, built in ranks(tp_size)(counted_and_built, VARIANTS[name]):
        assert counted == built


@pytest.mark.parametrize("tp_size", [1, 4])
def test_isolated_documents(ranks, tp_size):
    def losses(isolate, changed):
        return ranks(tp_size)(losses_of_isolated_documents, isolate, changed)[0]

    assert torch.equal(losses(True, False), losses(True, True))
    assert not torch.allclose(losses(False, False), losses(False, True))
