"""Qwen 3, dense (arXiv:2505.09388): QK-norm."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_biases, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.checkpoint.families.windows import window_of_local_layers


def read(settings: Settings) -> ModelArguments:
    settings.drop("use_sliding_window", "max_window_layers")  # layer_types says it
    decoder = read_decoder(settings)
    config = {"qk_layernorm": True, **read_biases(settings), **window_of_local_layers(settings)}
    return ModelArguments(decoder.config | config, decoder.gpt)


FAMILY = Family("qwen3", read, MODULES)
