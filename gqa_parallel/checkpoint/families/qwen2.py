"""Qwen 2 and 2.5 (arXiv:2407.10671): biases on QKV."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.checkpoint.families.windows import window_of_local_layers


def read(settings: Settings) -> ModelArguments:
    settings.drop("use_sliding_window", "max_window_layers")  # layer_types says it
    decoder = read_decoder(settings)
    return ModelArguments(decoder.config | window_of_local_layers(settings) | {"add_qkv_bias": True}, decoder.gpt)


FAMILY = Family("qwen2", read, MODULES)
