"""Llama 1 to 3 (arXiv:2302.13971, arXiv:2407.21783), and what is stored as one: SmolLM2, Yi, TinyLlama."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_biases, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.settings import Settings


def read(settings: Settings) -> ModelArguments:
    decoder = read_decoder(settings)
    return ModelArguments(decoder.config | read_biases(settings), decoder.gpt)


FAMILY = Family("llama", read, MODULES)
