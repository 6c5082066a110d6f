"""Mistral (arXiv:2310.06825): Llama with a sliding window in every layer, or with none."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.checkpoint.families.windows import window_of_all_layers


def read(settings: Settings) -> ModelArguments:
    decoder = read_decoder(settings)
    return ModelArguments(decoder.config | window_of_all_layers(settings), decoder.gpt)


FAMILY = Family("mistral", read, MODULES)
