"""Cost against hand computation, published parameter counts, Hugging Face models and a FLOP counter."""

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gqa_parallel.conf import schema
from gqa_parallel.conf.model_shape import model_shape
from gqa_parallel.conf.schema import ModelConfig
from gqa_parallel.partition.cost import (
    Collective,
    ModelShape,
    ParameterCounts,
    activation_bytes,
    fullest_rank,
    kv_cache_bytes_per_token,
    layer_collectives,
    model_flops_per_token,
    padded_vocab_size,
    parameter_counts,
    rank_memory,
)
from tests.unit.partition.test_heads import partitions

SMALL = ModelShape(
    num_layers=2,
    hidden_size=11,
    num_heads=6,
    num_kv_heads=2,
    head_dim=5,
    ffn_hidden_size=12,
    vocab_size=128,
    qk_norm=True,
)
BIASED = replace(SMALL, gated_mlp=False, linear_bias=True, layernorm_bias=True, tie_embeddings=True)

# of the released checkpoints
PUBLISHED = {
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "phi4": 14_659_507_200,
    "smollm2_135m": 134_515_008,
    "llama2_7b": 6_738_415_616,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "mistral_7b": 7_248_023_552,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
}


def preset(name: str) -> ModelConfig:
    schema.register()
    with initialize_config_module("gqa_parallel.conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", [f"model={name}"]).model)


def huggingface_model(name: str, model: ModelConfig, **settings):
    config_class, model_class = next(
        classes
        for prefix, classes in {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "smollm2": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "gemma2": (Gemma2Config, Gemma2ForCausalLM),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
            "phi4": (Phi3Config, Phi3ForCausalLM),
            "granite": (GraniteConfig, GraniteForCausalLM),
        }.items()
        if name.startswith(prefix)
    )
    return model_class(
        config_class(
            num_hidden_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim or model.hidden_size // model.num_heads,
            intermediate_size=model.ffn_hidden_size,
            vocab_size=model.vocab_size,
            tie_word_embeddings=model.tie_embeddings,
            pad_token_id=None,
            **settings,
        )
    )


@pytest.mark.parametrize("name", [*PUBLISHED, "gemma3_4b", "granite3_2b"])
def test_parameters_of_presets(name):
    model = preset(name)
    counts = parameter_counts(replace(model_shape(model, model.vocab_size), vocab_size=model.vocab_size))
    assert counts.total == PUBLISHED.get(name, counts.total)
    with torch.device("meta"):
        reference = huggingface_model(name, model)
    assert counts.total == sum(parameter.numel() for parameter in reference.parameters())


def test_parameters_by_hand():
    assert parameter_counts(SMALL) == ParameterCounts(
        embedding=128 * 11,
        attention=2 * (30 * 11 + 2 * 10 * 11 + 11 * 30),
        mlp=2 * (3 * 12 * 11),
        norms=2 * (2 * 11 + 2 * 5) + 11,
        output=128 * 11,
    )
    assert parameter_counts(SMALL).total == 5443
    assert parameter_counts(BIASED) == ParameterCounts(
        embedding=1408,
        attention=2 * (880 + (30 + 2 * 10) + 11),
        mlp=2 * (2 * 12 * 11 + 12 + 11),
        norms=2 * 75,
        output=0,
    )
    assert parameter_counts(replace(SMALL, qkv_bias=True)).attention == 2 * (880 + 50)


def test_parameters_of_ranks_by_hand():
    """Query heads 2, 1, 2, 1; one KV head each."""
    ranks = [parameter_counts(SMALL, SMALL.partition(4), rank) for rank in range(4)]
    assert [rank.attention for rank in ranks] == [2 * 330, 2 * 220, 2 * 330, 2 * 220]
    assert {(rank.embedding, rank.mlp, rank.norms, rank.output) for rank in ranks} == {(352, 198, 75, 352)}
    assert fullest_rank(SMALL, SMALL.partition(4)) == 0
    # the third rank has all query heads of the second group
    assert fullest_rank(SMALL, SMALL.partition(3)) == 2


@given(partitions(), st.booleans(), st.booleans())
def test_ranks_store_the_model_and_the_copies(partition, biased, tied):
    tp_size = partition.tp_size
    shape = replace(
        BIASED if biased else SMALL,
        num_heads=partition.num_heads,
        num_kv_heads=partition.num_kv_heads,
        ffn_hidden_size=13 * tp_size,
        vocab_size=padded_vocab_size(1000, tp_size),
        tie_embeddings=tied,
    )
    stored = sum(parameter_counts(shape, partition, rank).total for rank in range(tp_size))
    extra_kv_heads = sum(len(partition.kv_heads(rank)) for rank in range(tp_size)) - partition.num_kv_heads
    copies = extra_kv_heads * shape.num_layers * 2 * shape.head_dim * (shape.hidden_size + biased)
    copies += (tp_size - 1) * parameter_counts(shape).norms
    copies += (tp_size - 1) * biased * shape.num_layers * 2 * shape.hidden_size  # row-parallel biases
    assert stored - copies == parameter_counts(shape).total


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "padded"),
    [(257, 1, 384), (257, 8, 384), (384, 2, 384), (1, 3, 384), (385, 3, 768), (128256, 16, 128256)],
)
def test_padded_vocab_size(vocab_size, tp_size, padded):
    assert padded_vocab_size(vocab_size, tp_size) == padded


def test_flops_by_hand():
    weights = 1760 + 792 + 1408  # attention, MLP, output
    scores = 2 * 7 * 30 * 2  # 2 layers; QK^T and AV over half of 7 keys, 30 wide
    assert model_flops_per_token(SMALL, seq_len=7) == 3 * (2 * weights + scores) == 26280
    assert model_flops_per_token(replace(SMALL, tie_embeddings=True), 7) == 26280
    assert model_flops_per_token(BIASED, 7) == 26280 - 3 * 2 * 2 * 12 * 11  # no gate


def test_flops_against_the_counter():
    """Eager attention multiplies masked keys too: twice the causal half, which is that of 2 * seq_len."""
    model = ModelConfig(
        name="small",
        num_layers=2,
        hidden_size=24,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        ffn_hidden_size=28,
        vocab_size=128,
        max_position_embeddings=64,
    )
    batch, seq_len = 3, 17
    reference = huggingface_model("llama", model, attn_implementation="eager")
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        reference(tokens).logits.sum().backward()
    per_token = model_flops_per_token(model_shape(model, 128), 2 * seq_len)
    assert counter.get_total_flops() == batch * seq_len * per_token


def test_kv_cache_by_hand():
    assert kv_cache_bytes_per_token(SMALL) == 2 * 2 * (2 * 5) * 2
    assert kv_cache_bytes_per_token(SMALL, bytes_per_element=4) == 160
    assert [kv_cache_bytes_per_token(SMALL, SMALL.partition(4), rank) for rank in range(4)] == [40] * 4
    uneven = replace(SMALL, num_kv_heads=3).partition(2)
    assert [kv_cache_bytes_per_token(SMALL, uneven, rank) for rank in range(2)] == [80, 40]


def test_one_rank_communicates_nothing():
    assert layer_collectives(SMALL, SMALL.partition(1), num_tokens=14, sequence_parallel=True) == []


def test_collectives_by_hand():
    activation = 14 * 11
    assert layer_collectives(SMALL, SMALL.partition(4), num_tokens=14, sequence_parallel=False) == [
        Collective("attention", "forward", "all-reduce", "output", activation, 4),
        Collective("attention", "backward", "all-reduce", "input gradient", activation, 4),
        Collective("attention", "backward", "all-reduce", "KV weight gradient", 2 * 5 * 11, 2),
        Collective("attention", "backward", "all-reduce", "QK-norm gradient", 2 * 5, 4),
        Collective("mlp", "forward", "all-reduce", "output", activation, 4),
        Collective("mlp", "backward", "all-reduce", "input gradient", activation, 4),
    ]


def test_collectives_under_sequence_parallelism_by_hand():
    activation = 14 * 11
    found = layer_collectives(BIASED, BIASED.partition(2), num_tokens=14, sequence_parallel=True)
    part = [
        ("forward", "all-gather", "input", activation, 2),
        ("forward", "reduce-scatter", "output", activation, 2),
        ("backward", "all-gather", "output gradient", activation, 2),
        ("backward", "all-gather", "input, again", activation, 2),
        ("backward", "reduce-scatter", "input gradient", activation, 2),
    ]
    norm_and_bias = ("backward", "all-reduce", "norm and bias gradient", 3 * 11, 2)
    qk_norm = ("backward", "all-reduce", "QK-norm gradient", 2 * 2 * 5, 2)
    assert found == [
        *(Collective("attention", *row) for row in (*part, qk_norm, norm_and_bias)),
        *(Collective("mlp", *row) for row in (*part, norm_and_bias)),
    ]


def test_replicated_attention_gathers_its_input_once():
    found = layer_collectives(BIASED, BIASED.partition(4), num_tokens=14, sequence_parallel=True)
    attention = [collective for collective in found if collective.part == "attention"]
    assert [c.operation for c in attention if c.num_elements == 14 * 11] == [
        "all-gather",
        "reduce-scatter",
        "all-gather",
        "reduce-scatter",
    ]
    assert Collective("attention", "backward", "all-reduce", "KV weight gradient", 10 * 11 + 10, 2) in attention


@given(partitions(), st.booleans())
def test_no_activation_collective_depends_on_the_kv_heads(partition, sequence_parallel):
    """Bytes of activations never exceed those of MHA, whose heads Megatron shards evenly."""
    shape = replace(SMALL, num_heads=partition.num_heads, num_kv_heads=partition.num_kv_heads)
    mha = replace(shape, num_kv_heads=shape.num_heads)

    def activations(of: ModelShape) -> int:
        found = layer_collectives(of, of.partition(partition.tp_size), 1000, sequence_parallel)
        return sum(c.num_elements for c in found if not c.tensor.endswith(("norm gradient", "weight gradient")))

    assert activations(shape) <= activations(mha)
    if not sequence_parallel:
        assert activations(shape) == activations(mha)


@pytest.mark.parametrize(("operation", "sent"), [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 75)])
def test_sent_elements_of_a_ring(operation, sent):
    assert Collective("mlp", "forward", operation, "output", 100, 4).sent_elements == sent


@pytest.mark.parametrize(
    ("zero_stage", "mixed_precision", "states"),
    [  # 1637 parameters over dp 2: shards of 819
        (0, True, (2 * 1637, 2 * 1637, 12 * 1637)),
        (1, True, (2 * 1637, 2 * 1637, 12 * 819)),
        (2, True, (2 * 1637, 2 * 819, 12 * 819)),
        (3, True, (2 * 819, 2 * 819, 12 * 819)),
        (0, False, (4 * 1637, 4 * 1637, 8 * 1637)),
        (3, False, (4 * 819, 4 * 819, 8 * 819)),
    ],
)
def test_memory_by_hand(zero_stage, mixed_precision, states):
    memory = rank_memory(
        SMALL,
        SMALL.partition(4),
        dp_size=2,
        zero_stage=zero_stage,
        mixed_precision=mixed_precision,
        num_tokens=14,
    )
    assert (memory.parameters, memory.gradients, memory.optimizer) == states
    assert memory.activations == 14 * ((2 if mixed_precision else 4) * 218 + 128)
    assert memory.total == sum(states) + memory.activations


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "bytes_per_token"),
    [
        # layer: stream 3 x 11, QKV input 11, q and k 15 before and 15 after the norm, v 5, output 10, MLP 9
        (False, "none", 2 * (2 * 98 + 22) + 128),
        (False, "selective", 2 * (2 * 98 + 22) + 128),
        (False, "full", 2 * (2 * 11 + 98 + 22) + 128),
        # the stream is a quarter; the gathered QKV input stays whole
        (True, "none", 2 * (2 * 73.25 + 5.5) + 128),
        (True, "full", 2 * (2 * 2.75 + 73.25 + 5.5) + 128),
    ],
)
def test_activations_by_hand(sequence_parallel, recompute, bytes_per_token):
    found = activation_bytes(SMALL, SMALL.partition(4), 0, 14, sequence_parallel, recompute)
    assert found == pytest.approx(14 * bytes_per_token, abs=1)
