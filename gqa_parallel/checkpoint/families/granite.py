"""Granite 3, dense (arXiv:2405.04324, arXiv:2408.13359): multipliers on embeddings, scores, branches and logits."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_biases, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.megatron.variant import GPTVariant


def read(settings: Settings) -> ModelArguments:
    decoder = read_decoder(settings)
    variant = GPTVariant(
        embedding_multiplier=settings.take("embedding_multiplier", 1.0),
        residual_multiplier=settings.take("residual_multiplier", 1.0),
        logit_multiplier=1 / settings.take("logits_scaling", 1.0),
    )
    config = {"softmax_scale": settings.take("attention_multiplier", 1.0), **read_biases(settings)}
    return ModelArguments(decoder.config | config, decoder.gpt | {"variant": variant})


FAMILY = Family("granite", read, MODULES)
