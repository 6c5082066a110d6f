"""Tiny models of Hugging Face's families with random weights, and ours with the same weights; run inside the ranks."""

from dataclasses import fields, replace

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from gqa_parallel.attention.shared_parameters import sum_shared_gradients
from gqa_parallel.checkpoint.huggingface import export_weights, family_of, load_weights, model_arguments
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.model import GQAModel, build_gpt
from gqa_parallel.megatron.parameters import full_parameters
from gqa_parallel.megatron.variant import GPTVariant
from tests.distributed.layers import relative_error

# named, so that they are imported once, before the ranks are forked
MODELS = (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

SEQUENCE, BATCH, VOCAB = 12, 3, 47
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CASES: dict[str, dict] = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "llama_biases": {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 5},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": YARN},
    "gemma2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "phi3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67},
    },
    "granite": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.7,
    },
}


def huggingface_model(case: str, dtype: torch.dtype = torch.float32, fields: dict | None = None) -> nn.Module:
    """Random weights, every bias and norm away from its usual start.

    Args:
        fields: of the configuration, in place of the case's.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.removesuffix("_biases"), **(SMALL | CASES[case] | (fields or {})))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def our_model(hf_config, dtype: torch.dtype = torch.float32, settings: dict | None = None) -> GQAModel:
    """The same model, its weights still to be loaded.

    Args:
        settings: of ``GQATransformerConfig`` or ``GPTVariant``, in place of the family's.
    """
    model_parallel_cuda_manual_seed(0, tp_rank=parallel_state.get_tensor_model_parallel_rank(), ep_rank=0, etp_rank=0)
    arguments, settings = model_arguments(hf_config), dict(settings or {})
    variant = arguments.gpt.get("variant", GPTVariant())
    of_variant = {field.name: settings.pop(field.name) for field in fields(GPTVariant) if field.name in settings}
    config = GQATransformerConfig(
        **arguments.config
        | {"tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(), "params_dtype": dtype}
        | settings
    )
    return build_gpt(config, **arguments.gpt | {"variant": replace(variant, **of_variant)})


def random_tokens(seed: int) -> Tensor:
    """[BATCH, SEQUENCE]."""
    return torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(seed))


def compare_with_huggingface(case: str, settings: dict | None = None, dtype: str = "float32") -> dict[str, float]:
    """Forward, loss and backward of both on the same tokens.

    Returns:
        Relative error of the logits, of the loss, and of the gradient of every tensor of Hugging Face's model.
    """
    theirs = huggingface_model(case, getattr(torch, dtype))
    family = family_of(theirs.config)
    ours = our_model(theirs.config, getattr(torch, dtype), settings)
    load_weights(ours, theirs.state_dict(), family)
    sum_shared_gradients(ours, parallel_state.get_tensor_model_parallel_group())

    tokens, labels = random_tokens(1), random_tokens(2)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)

    their_logits = theirs(tokens).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    their_loss.backward()
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(ours(tokens, positions, None))
    loss = ours(tokens, positions, None, labels=labels).mean()
    loss.backward()

    assert torch.all(logits[..., VOCAB:] == -torch.inf), "padding must not be predicted"
    gradients = export_weights(ours, family, lambda parameter: parameter.grad)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    errors = {"logits": relative_error(logits[..., :VOCAB], their_logits), "loss": relative_error(loss, their_loss)}
    return errors | {name: relative_error(gradients[name], expected[name]) for name in expected}


def logit_error_with(case: str, settings: dict) -> float:
    """Relative error of the logits where our model is built with other settings than the family's."""
    theirs = huggingface_model(case)
    ours = our_model(theirs.config, settings=settings)
    load_weights(ours, theirs.state_dict(), family_of(theirs.config))
    tokens = random_tokens(1)
    with torch.no_grad():
        logits = ours(tokens, torch.arange(SEQUENCE).expand(BATCH, -1), None)[..., :VOCAB]
        return relative_error(logits, theirs(tokens).logits)


def changed_by_a_round_trip(case: str, fields: dict | None = None) -> list[str]:
    """Names of the tensors that are not bit-equal after import and export."""
    theirs = huggingface_model(case, fields=fields)
    ours = our_model(theirs.config)
    load_weights(ours, theirs.state_dict(), family_of(theirs.config))
    exported = export_weights(ours, family_of(theirs.config))
    named = dict(theirs.named_parameters())
    assert exported.keys() == named.keys()
    return [name for name, tensor in named.items() if not torch.equal(exported[name], tensor)]


class Slices:
    """A tensor that counts the elements that are read of it, as a lazily loaded one would."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.num_read = tensor, tensor.shape, 0

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        part = self.tensor[index]
        self.num_read += part.numel()
        return part


def elements_read_and_held(case: str) -> tuple[int, int]:
    """Of all tensors together by this rank while loading, and of its parameters without padding."""
    theirs = huggingface_model(case)
    ours = our_model(theirs.config)
    tensors = {name: Slices(tensor) for name, tensor in theirs.named_parameters()}
    load_weights(ours, tensors, family_of(theirs.config))
    tp_group = parallel_state.get_tensor_model_parallel_group()
    held = 0
    for _, parameter, sharding in full_parameters(ours, tp_group.size()):
        rows = sum(map(len, sharding.pieces[tp_group.rank()]))
        held += rows * (parameter.numel() // parameter.shape[sharding.dim])
    return sum(tensor.num_read for tensor in tensors.values()), held


def refusal_of_tensors(case: str, remove: str | None = None, add: str | None = None, cut: str | None = None) -> str:
    """The message for tensors with one missing, one too many or one a row short."""
    theirs = huggingface_model(case)
    ours = our_model(theirs.config)
    tensors = dict(theirs.named_parameters())
    tensors.pop(remove, None)
    if add is not None:
        tensors[add] = torch.zeros(1)
    if cut is not None:
        tensors[cut] = tensors[cut][1:]
    try:
        load_weights(ours, tensors, family_of(theirs.config))
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")
