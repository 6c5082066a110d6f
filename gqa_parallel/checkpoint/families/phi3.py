"""Phi-3, Phi-3.5 and Phi-4, dense, short context (arXiv:2404.14219): fused QKV and gate-up projections."""

from gqa_parallel.checkpoint.families.decoder import MODULES, read_decoder
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.names import FusedQKV, Stacked
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.checkpoint.families.windows import window_of_all_layers


def read(settings: Settings) -> ModelArguments:
    settings.drop("original_max_position_embeddings")  # rope_parameters says it where it matters
    settings.require("embd_pdrop", 0.0, "dropout outside attention differs from Megatron-Core's")
    settings.require("resid_pdrop", 0.0, "dropout outside attention differs from Megatron-Core's")
    decoder = read_decoder(settings)
    return ModelArguments(decoder.config | window_of_all_layers(settings), decoder.gpt)


FAMILY = Family(
    "phi3",
    read,
    MODULES
    | {
        "self_attention.linear_qkv": FusedQKV("self_attn.qkv_proj"),
        "mlp.linear_fc1": Stacked(("mlp.gate_up_proj",)),
    },
)
