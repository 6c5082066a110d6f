"""Hugging Face folders to checkpoints of ours and back, and MHA to GQA.

gqa-convert source=models/llama target=models/llama-native format=native
gqa-convert source=models/llama target=models/llama-gqa num_kv_heads=8 pooling=mean
gqa-convert source=runs/demo target=models/demo
"""

import time
from dataclasses import dataclass
from enum import Enum

from hydra.core.config_store import ConfigStore

from gqa_parallel.errors import UserError
from gqa_parallel.launch.program import program


class Format(Enum):
    hf = "hf"
    native = "native"


class Dtype(Enum):
    fp32 = "float32"
    bf16 = "bfloat16"
    fp16 = "float16"


@dataclass
class ConvertConfig:
    """See ``gqa_parallel.training.conversion.convert``."""

    source: str | None = None  # a model folder of Hugging Face, a checkpoint of ours, or a run directory
    target: str | None = None  # a new folder
    format: Format = Format.hf  # of target
    num_kv_heads: int | None = None  # a divisor of the model's; null: the model's
    pooling: str = "mean"  # mean, first or random
    seed: int = 0  # of pooling=random
    dtype: Dtype | None = None  # of format=hf; null: as in the source


ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)


@program(ConvertConfig, "convert")
def main(config: ConvertConfig) -> None:
    if not config.source or not config.target:
        raise UserError(
            f"source ({config.source}) and target ({config.target}) must be given: the one is read, the other written. "
            "Use gqa-convert source=FOLDER target=FOLDER."
        )
    import torch

    from gqa_parallel.training.conversion import convert

    start = time.monotonic()
    converted = convert(
        config.source,
        config.target,
        native=config.format is Format.native,
        num_kv_heads=config.num_kv_heads,
        pooling=config.pooling,
        seed=config.seed,
        dtype=None if config.dtype is None else getattr(torch, config.dtype.value),
    )
    pooled = converted.num_kv_heads != converted.old_num_kv_heads
    heads = f"{converted.old_num_kv_heads} -> " if pooled else ""
    print(
        f"{config.target}: {converted.model_type}, {heads}{converted.num_kv_heads} KV heads, {converted.num_tensors} "
        f"tensors, {converted.num_bytes / 1e9:.3f} GB in {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
