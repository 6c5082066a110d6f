"""Mistral (arXiv:2310.06825): Llama with a sliding window in every layer, or with none."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_decoder
from gqa_parallel.checkpoint.families.family import Family

FAMILY = Family("mistral", read_decoder, MODULES)
