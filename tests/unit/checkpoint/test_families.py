import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, Gemma3TextConfig

from gqa_parallel import UserError
from gqa_parallel.attention.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling
from gqa_parallel.checkpoint.families import FAMILIES
from gqa_parallel.checkpoint.families.names import FusedQKV, Rows, SplitQKV, Stacked
from gqa_parallel.checkpoint.huggingface import family_of, model_arguments
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.variant import GPTVariant


def refusal(**fields) -> str:
    with pytest.raises(UserError) as caught:
        model_arguments(fields)
    return str(caught.value)


def test_an_unknown_family_is_told_the_known_ones():
    message = refusal(model_type="mamba")
    assert message.startswith(
        "model_type ('mamba') must be one of gemma2, gemma3_text, granite, llama, mistral, phi3, qwen2, qwen3: "
    )
    assert family_of(AutoConfig.for_model("qwen3")) is FAMILIES["qwen3"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_of_every_family_make_a_config(model_type):
    """Also: what ``transformers`` adds to a configuration by itself is known."""
    arguments = model_arguments({"model_type": model_type, "num_hidden_layers": 2})
    config = GQATransformerConfig(**arguments.config)
    assert (config.num_layers, config.normalization, config.gated_linear_unit) == (2, "RMSNorm", True)
    assert arguments.gpt["vocab_size"] == AutoConfig.for_model(model_type).vocab_size


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "llama", "attention_bias": True}, "attention_bias (True) must equal mlp_bias (False): "),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias (True) must equal mlp_bias (False): "),
        ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act ('relu') must be one of gelu, gelu_pytorch_tanh"),
        ({"model_type": "llama", "num_experts": 3}, "num_experts (3) must not be set for llama: "),
        ({"model_type": "llama", "quantization_config": {}}, "quantization_config ({}) must not be set for llama: "),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop (0.1) must be 0.0 for phi3: "),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention (True) must be False for gemma2: ",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 5.0},
            "attn_logit_softcapping (5.0) must be None for gemma3_text: ",
        ),
        (
            {"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "layer_types (chunked_attention) must be among full_attention, sliding_attention: ",
        ),
        (
            {"model_type": "gemma2", "num_hidden_layers": 1, "sliding_window": None},
            "sliding_window (None) must be a number of keys where layer_types has sliding_attention: ",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_is_not_implemented_is_refused_by_name(fields, message):
    assert refusal(**fields).startswith(message)


def test_longrope_is_refused():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    message = refusal(model_type="phi3", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})
    assert message.startswith("rope_type ('longrope') must be one of default, linear, llama3, dynamic, yarn: ")


@pytest.mark.parametrize(
    "parameters, rope",
    [
        ({"rope_type": "default", "rope_theta": 7.0}, Rope(7.0)),
        ({"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0}, Rope(7.0, scaling=LinearScaling(3.0))),
        ({"rope_type": "dynamic", "rope_theta": 7.0, "factor": 3.0}, Rope(7.0, scaling=DynamicScaling(3.0, 640))),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 7.0,
                "factor": 3.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            Rope(7.0, scaling=Llama3Scaling(3.0, 1.0, 4.0, 64)),
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 7.0,
                "factor": 10.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
                "truncate": False,
            },
            Rope(7.0, scaling=YarnScaling(10.0, 64, beta_fast=16.0, truncate=False)),
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else None,
)
def test_rotary_positions(parameters, rope):
    fields = {"model_type": "llama", "max_position_embeddings": 640, "rope_parameters": parameters}
    assert model_arguments(fields).config["rope"] == rope


def test_an_unknown_parameter_of_rotary_positions_is_refused():
    parameters = {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0, "twist": 2}
    assert refusal(model_type="llama", rope_parameters=parameters).startswith(
        "rope_parameters (twist) must not be set for rope_type 'linear': "
    )


def test_what_transformers_refuses_is_a_users_error():
    rope = {"rope_type": "linear", "rope_theta": 7.0}
    assert refusal(model_type="llama", rope_parameters=rope).startswith(
        "config.json (llama) must be one that transformers accepts: "
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "sliding_window": 5},
        {"model_type": "mistral", "num_hidden_layers": 1, "layer_types": ["full_attention"]},
    ],
    ids=["llama", "mistral"],
)
def test_what_transformers_would_overlook_is_refused(fields):
    assert "must not be set for " in refusal(**fields)


def test_windows():
    assert model_arguments({"model_type": "mistral", "sliding_window": 5}).config["window_size"] == (4, 0)
    assert "window_size" not in model_arguments({"model_type": "mistral", "sliding_window": None}).config
    assert "window_size" not in model_arguments({"model_type": "qwen2", "sliding_window": 5}).config
    late = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}
    config = model_arguments({"model_type": "qwen2", **late}).config
    assert (config["window_size"], config["window_attn_skip_freq"]) == ((4, 0), [0, 1, 1])


def test_gemma_3():
    arguments = model_arguments(Gemma3TextConfig(num_hidden_layers=6, hidden_size=1152, num_attention_heads=4))
    config = arguments.config
    assert config["window_attn_skip_freq"] == [1, 1, 1, 1, 1, 0]
    assert (config["rope"], config["local_rope"]) == (Rope(1e6), Rope(1e4))
    x = torch.linspace(-2, 2, 5)
    assert torch.equal(config["activation_func"](x), F.gelu(x, approximate="tanh"))
    assert arguments.gpt["variant"] == GPTVariant(embedding_multiplier=1152**0.5, post_norms=True)


def test_sources_of_qkv():
    config = GQATransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=2, kv_channels=3)
    split = SplitQKV("q", "k", "v").rows(24, config)
    assert split[:4] == [
        Rows("q", range(3)),
        Rows("q", range(3, 6)),
        Rows("k", range(3)),
        Rows("v", range(3)),
    ]
    fused = FusedQKV("qkv").rows(24, config)
    assert [indices.start // 3 for _, indices in fused] == [0, 1, 4, 6, 2, 3, 5, 7]
    assert Stacked(("gate", "up")).rows(10, config) == [Rows("gate", range(5)), Rows("up", range(5))]


def test_names_of_a_layers_tensors():
    (rows,) = FAMILIES["gemma2"].rows("decoder.layers.11.mlp.linear_fc2.post_layernorm.weight", 7, None)
    assert rows == Rows("model.layers.11.post_feedforward_layernorm.weight", range(7))
