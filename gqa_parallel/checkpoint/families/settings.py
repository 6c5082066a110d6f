"""The fields of a ``config.json``, none of which may be overlooked."""

from collections.abc import Mapping
from typing import Any

from gqa_parallel.errors import UserError

# say nothing about the mathematics of a forward pass in training
IRRELEVANT = frozenset(
    (
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


class Settings:
    """Hands out each field; what nobody has taken in the end is refused by name.

    Args:
        fields: the configuration, with its defaults filled in. None is as good as absent. Names with a leading
            underscore are private to ``transformers`` and left out.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.model_type = fields["model_type"]
        self._left = {
            name: value
            for name, value in fields.items()
            if value is not None and name not in IRRELEVANT and not name.startswith("_")
        }

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, ``default`` where it is absent."""
        return self._left.pop(name, default)

    def drop(self, *names: str) -> None:
        """Pass over fields that others imply."""
        for name in names:
            self._left.pop(name, None)

    def require(self, name: str, supported: Any, why: str) -> None:
        """
        Raises:
            UserError: a field is present and says something else.
        """
        value = self.take(name, supported)
        if value != supported:
            raise UserError(
                f"{name} ({value!r}) must be {supported!r} for {self.model_type}: {why}. Convert a model without it."
            )

    def choose(self, name: str, choices: Mapping[str, Any]) -> Any:
        """What a field's value stands for.

        Raises:
            UserError: names what is known.
        """
        value = self.take(name)
        if value not in choices:
            raise UserError(
                f"{name} ({value!r}) must be one of {', '.join(sorted(choices))}: no other is implemented. "
                "Convert a model with one of these."
            )
        return choices[value]

    def refuse_rest(self) -> None:
        """
        Raises:
            UserError: fields are left that nobody took.
        """
        if self._left:
            rest = ", ".join(f"{name} ({value!r})" for name, value in sorted(self._left.items()))
            raise UserError(
                f"{rest} must not be set for {self.model_type}: gqa_parallel does not implement it. "
                "Remove it from config.json if it does not change what the model computes."
            )
