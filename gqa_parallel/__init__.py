"""Tensor-parallel training of grouped-query attention (GQA) with Megatron-Core and DeepSpeed.

Names are imported on first use, so that ``gqa-plan`` needs neither torch nor a process group.
"""

import warnings
from importlib import import_module
from typing import Any

# Megatron-Core says while it is imported, once per module and rank, that these two are missing: both are optional
warnings.filterwarnings("ignore", message="(Transformer Engine|Apex)", module="megatron")

_HOME = {
    "HeadPartition": "partition.heads",
    "GroupedQueryAttention": "attention.grouped_query_attention",
    "GQATransformerConfig": "megatron.config",
    "gqa_layer_spec": "megatron.layer_spec",
    "with_gqa": "megatron.layer_spec",
    "deepspeed_engine": "deepspeed.engine",
    "UserError": "errors",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gqa_parallel' has no attribute {name!r}")
    return getattr(import_module(f"gqa_parallel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
