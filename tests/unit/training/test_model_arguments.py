"""A configured model, what builds it, and its ``config.json``: each says the same as the others."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn import functional as F

from gqa_parallel import conf
from gqa_parallel.checkpoint.families import FAMILIES
from gqa_parallel.checkpoint.families.family import ModelArguments
from gqa_parallel.checkpoint.huggingface import model_arguments
from gqa_parallel.conf.schema import ModelConfig
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.training.huggingface_config import huggingface_config
from gqa_parallel.training.model_arguments import differences, model_arguments_of, model_config_of
from tests.unit.conf.test_presets import composed

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))
VOCAB = 257


def preset(name: str) -> ModelConfig:
    return composed(f"model={name}").model


def spelt(model: ModelConfig) -> ModelConfig:
    """The one spelling that ``model_config_of`` has for it."""
    return model_config_of(model_arguments_of(model, model.vocab_size or VOCAB), model.name)


@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_a_preset_say_all_of_it(name):
    model = preset(name)
    again = spelt(model)
    unspelt = replace(
        again,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        softmax_scale=model.softmax_scale,
        rope_scaling=replace(again.rope_scaling, attention_factor=model.rope_scaling.attention_factor),
    )
    assert unspelt == model
    assert spelt(again) == again


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt_oss_debug"])
def test_a_preset_has_a_config_json(name):
    model = preset(name)
    fields = huggingface_config(model, model.vocab_size or VOCAB)
    families = {
        "gemma2": "gemma2",
        "gemma3": "gemma3_text",
        "qwen2.5": "qwen2",
        "qwen3": "qwen3",
        "granite3": "granite",
    }
    assert fields["model_type"] == families.get(name.split("_")[0], "qwen3" if model.qk_norm else "llama")
    assert not differences(model_config_of(model_arguments(fields), "read"), spelt(model))


def test_a_model_that_no_family_has():
    message = r"model \(gpt-oss-debug\) must be of a family of Hugging Face .* has no .*model.sinks=true \(only false\)"
    with pytest.raises(UserError, match=message):
        huggingface_config(preset("gpt_oss_debug"), VOCAB)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_configurable(model_type):
    """Its arguments, put into words of the configuration and back, build the same model."""
    arguments = model_arguments({"model_type": model_type, "num_hidden_layers": 12})
    model = model_config_of(arguments, model_type)
    again = model_arguments_of(model, arguments.gpt["vocab_size"])
    assert not differences(model, model_config_of(again, model_type))
    one, other = GQATransformerConfig(**arguments.config), GQATransformerConfig(**again.config)
    for name in ("rope", "local_rope", "window_size", "qk_layernorm", "add_qkv_bias", "attention_softcap"):
        assert getattr(one, name) == getattr(other, name)
    assert (one.softmax_scale or one.kv_channels**-0.5) == pytest.approx(other.softmax_scale or other.kv_channels**-0.5)


def test_differences_are_overrides():
    here, there = spelt(preset("llama2_7b")), spelt(preset("llama3.1_8b"))
    assert differences(here, there) == {
        "model.num_kv_heads": ("32", "8"),
        "model.ffn_hidden_size": ("11008", "14336"),
        "model.vocab_size": ("32000", "128256"),
        "model.rope_theta": ("10000.0", "500000.0"),
        "model.rope_scaling.type": ("none", "llama3"),
        "model.rope_scaling.factor": ("1.0", "8.0"),
        "model.rope_scaling.original_max_position_embeddings": ("null", "8192"),
    }
    assert differences(here, replace(here, name="other", init_std=1.0, max_position_embeddings=7)) == {}
    overrides = [f"{key}={theirs}" for key, (_, theirs) in differences(here, there).items()]
    assert not differences(spelt(composed("model=llama2_7b", *overrides).model), there)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_func": F.relu}, "activation (relu) must be expressible"),
        (
            {"window_size": (3, 0), "window_attn_skip_freq": [1, 0, 0, 1]},
            "order of local layers ([1, 0, 0, 1]) must be",
        ),
        ({"moe_router_topk": 2}, "settings (moe_router_topk) must be expressible by the keys of model"),
    ],
)
def test_what_the_configuration_cannot_say(change, message):
    arguments = model_arguments_of(preset("tiny"), VOCAB)
    with pytest.raises(UserError) as caught:
        model_config_of(ModelArguments(arguments.config | change, arguments.gpt), "x")
    assert message in str(caught.value)
