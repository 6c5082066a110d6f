"""Megatron-Core's ``GPTModel`` with grouped-query attention."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from gqa_parallel.errors import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.layer_spec import gqa_block_spec
from gqa_parallel.megatron.variant import GPTVariant, with_variant
from gqa_parallel.partition.cost import padded_vocab_size


class GQAModel(GPTModel):
    """A ``GPTModel`` of any vocabulary, with a ``GPTVariant``.

    Args:
        vocab_size: tokens. The embedding has ``padded_vocab_size`` rows; a padding row is never predicted, so it
            changes no loss.
        variant: departures from the pre-norm transformer.
        The others are ``GPTModel``'s.
    """

    def __init__(self, config: TransformerConfig, *, vocab_size: int, variant: GPTVariant, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.embedding_init_method = _without_padding(config.embedding_init_method, vocab_size)
        super().__init__(
            config=config,
            transformer_layer_spec=with_variant(gqa_block_spec(config), variant),
            vocab_size=padded_vocab_size(vocab_size, config.tensor_model_parallel_size),
            **kwargs,
        )
        self.unpadded_vocab_size = vocab_size
        self.variant = variant
        # forward hooks, so that ``GPTModel.forward`` stays Megatron's
        if variant.embedding_multiplier != 1:
            self.embedding.register_forward_hook(self._scale_embeddings)
        self.output_layer.register_forward_hook(self._finish_logits)

    def _scale_embeddings(self, embedding: nn.Module, _inputs: Any, embeddings: Tensor) -> Tensor:
        multiplier = torch.tensor(self.variant.embedding_multiplier, dtype=embedding.word_embeddings.weight.dtype)
        return embeddings * multiplier.item()

    def _finish_logits(self, _layer: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Scale and cap this rank's logits, [S, B, V / T] or gathered, and rule out the padding."""
        logits, bias = output
        if self.variant.logit_multiplier != 1:
            logits = logits * self.variant.logit_multiplier
        if self.variant.logit_softcap is not None:
            logits = torch.tanh(logits / self.variant.logit_softcap) * self.variant.logit_softcap
        if self.unpadded_vocab_size < self.vocab_size:
            gathered = logits.shape[-1] == self.vocab_size
            first = 0 if gathered else self.pg_collection.tp.rank() * logits.shape[-1]
            tokens = torch.arange(first, first + logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(tokens >= self.unpadded_vocab_size, -torch.inf)
        return logits, bias


def _without_padding(init_method: Callable[[Tensor], Any], vocab_size: int) -> Callable[[Tensor], None]:
    """Draw the vocabulary's rows and no others: how many there are depends on the tensor-parallel size."""

    def draw(weight: Tensor) -> None:
        weight[vocab_size:].zero_()
        init_method(weight[:vocab_size])

    return draw


def build_gpt(
    config: GQATransformerConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    tie_embeddings: bool,
    variant: GPTVariant | None = None,
) -> GQAModel:
    """A decoder-only model on this rank's device; ``parallel_state`` and the random seeds are set.

    Args:
        config: sizes and parallelism; ``config.rope`` gives the positions.
        vocab_size: tokens.
        max_sequence_length: longest sequence, in tokens.
        tie_embeddings: the output projection is the embedding.
        variant: departures from the pre-norm transformer; None: none.
    Returns:
        The model; called with token ids, positions, None and labels, each [B, S], it gives the loss of every token,
        [B, S], in nats.
    Raises:
        UserError: ``config.rope`` is None.
    """
    if config.rope is None:
        raise UserError(
            "config.rope (None) must be a Rope: the model would not know the order of its tokens. "
            "Set rope=Rope(theta=10000.0)."
        )
    model = GQAModel(
        config,
        vocab_size=vocab_size,
        variant=variant or GPTVariant(),
        max_sequence_length=max_sequence_length,
        share_embeddings_and_output_weights=tie_embeddings,
        position_embedding_type="none",  # the attention layers rotate by themselves
    )
    return model.to(torch.cuda.current_device())


def weight_decay_groups(model: nn.Module) -> list[dict]:
    """Optimizer groups: matrices decay; norms and biases do not (``wd_mult`` is what Megatron's schedule reads)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "wd_mult": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "wd_mult": 0.0, "weight_decay": 0.0},
    ]
