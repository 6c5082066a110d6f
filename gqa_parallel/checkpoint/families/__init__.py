"""The families of Hugging Face's models that we know, one file each."""

from gqa_parallel.checkpoint.families import gemma2, gemma3, granite, llama, mistral, phi3, qwen2, qwen3
from gqa_parallel.checkpoint.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (gemma2, gemma3, granite, llama, mistral, phi3, qwen2, qwen3)
}
