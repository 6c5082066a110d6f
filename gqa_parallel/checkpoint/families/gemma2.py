"""Gemma 2 (arXiv:2408.00118): local and global layers in turn, capped scores and logits, norms on both sides."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_biases, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.names import Stacked
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.checkpoint.families.windows import window_of_local_layers
from gqa_parallel.megatron.variant import GPTVariant

GEMMA_MODULES = MODULES | {
    "self_attention.linear_proj.post_layernorm": Stacked(("post_attention_layernorm",)),
    "pre_mlp_layernorm": Stacked(("pre_feedforward_layernorm",)),
    "mlp.linear_fc2.post_layernorm": Stacked(("post_feedforward_layernorm",)),
}


def read_gemma(settings: Settings) -> ModelArguments:
    """What Gemma 2 and 3 share."""
    settings.require("use_bidirectional_attention", False, "attention is causal")
    decoder = read_decoder(settings, activation="hidden_activation")
    config = {
        "layernorm_zero_centered_gamma": True,
        "softmax_scale": settings.take("query_pre_attn_scalar") ** -0.5,
        **read_biases(settings),
        **window_of_local_layers(settings),
    }
    variant = GPTVariant(
        embedding_multiplier=decoder.config["hidden_size"] ** 0.5,
        post_norms=True,
        logit_softcap=settings.take("final_logit_softcapping"),
    )
    return ModelArguments(decoder.config | config, decoder.gpt | {"variant": variant})


def read(settings: Settings) -> ModelArguments:
    softcap = settings.take("attn_logit_softcapping")
    gemma = read_gemma(settings)
    return ModelArguments(gemma.config | {"attention_softcap": softcap}, gemma.gpt)


FAMILY = Family("gemma2", read, GEMMA_MODULES)
