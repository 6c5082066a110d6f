"""What a family of models says about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gqa_parallel.checkpoint.families.names import Rows, Source
from gqa_parallel.checkpoint.families.settings import Settings


@dataclass(frozen=True)
class ModelArguments:
    """What builds a model: ``build_gpt(GQATransformerConfig(**config, ...), **gpt)``.

    Args:
        config: of ``GQATransformerConfig``; parallelism and precision are left to the caller.
        gpt: of ``build_gpt``.
    """

    config: dict[str, Any]
    gpt: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Args:
        model_type: its name in ``config.json``.
        read: takes every field of the configuration that the model depends on.
        modules: for each module of ours that has parameters, relative to its layer where it is in one, the modules of
            Hugging Face that it is made of.
        layer: the name of layer number ``{}``.
    """

    model_type: str
    read: Callable[[Settings], ModelArguments]
    modules: Mapping[str, Source]
    layer: str = "model.layers.{}."

    def arguments(self, fields: Mapping[str, Any]) -> ModelArguments:
        """
        Args:
            fields: the configuration, with its defaults filled in.
        Raises:
            UserError: a field asks for something that is not implemented, or nobody knows it.
        """
        settings = Settings(fields)
        arguments = self.read(settings)
        settings.refuse_rest()
        return arguments

    def rows(self, name: str, size: int, config: Any) -> list[Rows]:
        """The rows of Hugging Face's tensors that one below the other make a full tensor of ours.

        Args:
            name: of the full tensor, ``decoder.layers.0.mlp.linear_fc1.weight``.
            size: of the full tensor along the dimension in which it is stacked or cut.
            config: the model's ``TransformerConfig``.
        Raises:
            KeyError: the family has no such parameter.
        """
        module, _, kind = name.rpartition(".")
        prefix = ""
        if module.startswith("decoder.layers."):
            number, _, module = module.removeprefix("decoder.layers.").partition(".")
            prefix = self.layer.format(number)
        rows = self.modules[module].rows(size, config)
        return [Rows(f"{prefix}{tensor}.{kind}", indices) for tensor, indices in rows]
