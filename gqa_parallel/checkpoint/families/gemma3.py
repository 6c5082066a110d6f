"""Gemma 3, text only (arXiv:2503.19786): QK-norm, five local layers to one global, a RoPE base for each kind."""

from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.gemma2 import GEMMA_MODULES, read_gemma
from gqa_parallel.checkpoint.families.settings import Settings


def read(settings: Settings) -> ModelArguments:
    settings.drop("sliding_window_pattern")  # layer_types says it
    settings.require("attn_logit_softcapping", None, "transformers does not cap its scores either")
    gemma = read_gemma(settings)
    return ModelArguments(gemma.config | {"qk_layernorm": True}, gemma.gpt)


FAMILY = Family("gemma3_text", read, GEMMA_MODULES)
