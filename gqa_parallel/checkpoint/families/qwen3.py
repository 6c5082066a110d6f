"""Qwen 3, dense (arXiv:2505.09388): QK-norm."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_biases, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.settings import Settings


def read(settings: Settings) -> ModelArguments:
    settings.drop("use_sliding_window", "max_window_layers")  # layer_types says it
    decoder = read_decoder(settings)
    return ModelArguments(decoder.config | read_biases(settings) | {"qk_layernorm": True}, decoder.gpt)


FAMILY = Family("qwen3", read, MODULES)
