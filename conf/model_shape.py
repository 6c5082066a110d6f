"""A ``ModelConfig`` as the cost model's ``ModelShape``."""

from gqa_parallel.conf.schema import Activation, ModelConfig, Normalization
from gqa_parallel.errors import UserError
from gqa_parallel.partition.cost import ModelShape, padded_vocab_size


def head_dim(model: ModelConfig) -> int:
    """Width of one head: ``model.head_dim``, or ``hidden_size / num_heads`` where that is null.

    Raises:
        UserError: ``head_dim`` is null and ``num_heads`` does not divide ``hidden_size``.
    """
    if model.head_dim is not None:
        return model.head_dim
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size ({model.hidden_size}) must be a multiple of model.num_heads "
            f"({model.num_heads}): model.head_dim is null and stands for their quotient. Set model.head_dim."
        )
    return model.hidden_size // model.num_heads


def model_shape(model: ModelConfig, vocab_size: int, tp_size: int = 1) -> ModelShape:
    """The sizes that cost follows from.

    Args:
        model: the configured model.
        vocab_size: the model's or the tokenizer's, without padding.
        tp_size: tensor-parallel ranks, which the vocabulary is padded for.
    """
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=head_dim(model),
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=padded_vocab_size(vocab_size, tp_size),
        gated_mlp=model.activation is not Activation.gelu,
        qkv_bias=model.qkv_bias,
        linear_bias=model.linear_bias,
        qk_norm=model.qk_norm,
        layernorm_bias=model.normalization is Normalization.layernorm,
        tie_embeddings=model.tie_embeddings,
        output_gate=model.output_gate,
        sinks=model.sinks,
        post_norms=model.post_norms,
        window=model.window,
        global_every=model.global_every,
    )
