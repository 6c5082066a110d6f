"""Weights to and from the tensors of Hugging Face's models, each rank reading only its own slices."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gqa_parallel.checkpoint.families import FAMILIES
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.families.names import Rows
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.model import GQAModel
from gqa_parallel.megatron.parameters import Sharding, full_parameters, gather_full


def family_of(hf_config: Any) -> Family:
    """The family of a model.

    Args:
        hf_config: a ``transformers`` configuration, or the fields of a ``config.json``.
    Raises:
        UserError: we don't know it; the message lists those that we do.
    """
    model_type = hf_config.get("model_type") if isinstance(hf_config, Mapping) else hf_config.model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type ({model_type!r}) must be one of {', '.join(sorted(FAMILIES))}: how another family computes is "
            "unknown. Add it in a file of gqa_parallel/checkpoint/families."
        )
    return FAMILIES[model_type]


def model_arguments(hf_config: Any) -> ModelArguments:
    """What builds the model of a configuration.

    Args:
        hf_config: as for ``family_of``; what a ``config.json`` leaves out is filled in by ``transformers``.
    Raises:
        UserError: we don't know the family, ``transformers`` refuses the fields, or they ask for something that is
            not implemented.
    """
    family = family_of(hf_config)
    if isinstance(hf_config, Mapping):
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            hf_config = AutoConfig.for_model(**hf_config)
        except (StrictDataclassError, KeyError, ValueError) as error:
            raise UserError(
                f"config.json ({family.model_type}) must be one that transformers accepts: {error}. Correct it."
            ) from error
    return family.arguments(hf_config.to_dict())


@torch.no_grad()
def load_weights(model: GQAModel, tensors: Mapping[str, Tensor], family: Family) -> None:
    """Set every parameter of this rank.

    Args:
        model: built from the family's ``ModelArguments``, before ``deepspeed_engine`` wraps it.
        tensors: of the whole model under Hugging Face's names. Only ``shape`` and slices are asked for, so what loads
            lazily is read in part.
        family: of both.
    Raises:
        UserError: a tensor is missing, left over or of another shape; names them all.
    """
    tp_group = model.pg_collection.tp
    parameters = [
        (parameter, sharding, _sources(sharding, model, family))
        for _, parameter, sharding in full_parameters(model, tp_group.size())
    ]
    _refuse_other_tensors(tensors, _shapes([(sharding, sources) for _, sharding, sources in parameters]), model)
    for parameter, sharding, sources in parameters:
        offset = 0
        before = (slice(None),) * sharding.dim
        for piece in sharding.pieces[tp_group.rank()]:
            for name, indices in _within(sources, piece):
                part = tensors[name][(*before, slice(indices.start, indices.stop))]
                parameter.data.narrow(sharding.dim, offset, len(indices)).copy_(part)
                offset += len(indices)
        parameter.data.narrow(sharding.dim, offset, parameter.shape[sharding.dim] - offset).zero_()  # padding


def exported_tensors(
    model: GQAModel, family: Family, value: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the whole model under Hugging Face's names, one full tensor at a time.

    Args:
        model: on each rank of its tensor-parallel group; all of them iterate to the end.
        family: whose names to give.
        value: what to export of a parameter, shaped like it: its data, or its gradient.
    Communication: each rank broadcasts its parts.
    """
    tp_group = model.pg_collection.tp
    parts: dict[str, list[tuple[nn.Parameter, Sharding]]] = defaultdict(list)
    for _, parameter, sharding in full_parameters(model, tp_group.size()):
        parts[sharding.name].append((parameter, sharding))
    for pieces in parts.values():
        full = gather_full([(value(parameter), sharding) for parameter, sharding in pieces], tp_group)
        sharding = pieces[0][1]
        rows_of: dict[str, list[tuple[range, Tensor]]] = defaultdict(list)
        offset = 0
        for name, indices in _sources(sharding, model, family):
            rows_of[name].append((indices, full.narrow(sharding.dim, offset, len(indices))))
            offset += len(indices)
        for name, rows in rows_of.items():
            rows.sort(key=lambda item: item[0].start)
            yield name, torch.cat([tensor for _, tensor in rows], dim=sharding.dim)


def export_weights(
    model: GQAModel, family: Family, value: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data
) -> dict[str, Tensor]:
    """All of ``exported_tensors``, on every rank."""
    return dict(exported_tensors(model, family, value))


def _sources(sharding: Sharding, model: GQAModel, family: Family) -> list[Rows]:
    return family.rows(sharding.name, sharding.shape[sharding.dim], model.config)


def _shapes(parameters: list[tuple[Sharding, list[Rows]]]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of Hugging Face that the parameters are made of."""
    sizes: dict[str, int] = defaultdict(int)
    shapes: dict[str, tuple[int, ...]] = {}
    for sharding, sources in parameters:
        for name, indices in sources:
            sizes[name] = max(sizes[name], indices.stop)
            shapes[name] = (*sharding.shape[: sharding.dim], sizes[name], *sharding.shape[sharding.dim + 1 :])
    return shapes


def _within(sources: list[Rows], piece: range) -> Iterator[Rows]:
    """The rows of Hugging Face's tensors that make a range of the full tensor."""
    offset = 0
    for name, indices in sources:
        start, stop = max(piece.start - offset, 0), min(piece.stop - offset, len(indices))
        if start < stop:
            yield Rows(name, indices[start:stop])
        offset += len(indices)


def _refuse_other_tensors(tensors: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]], model: GQAModel) -> None:
    """
    Raises:
        UserError: the tensors are not those of the model.
    """
    # transformers, too, passes over a stored copy of a tied output layer, and over frequencies in old files
    tied = {"lm_head.weight"} if model.share_embeddings_and_output_weights else set()
    found = {name for name in tensors if name not in tied and not name.endswith("rotary_emb.inv_freq")}
    for problem, names in (("lack", expected.keys() - found), ("hold besides", found - expected.keys())):
        if names:
            raise UserError(
                f"tensors ({len(found)}) must be those of the model ({len(expected)}): they {problem} "
                f"{', '.join(sorted(names))}. Pass the tensors that belong to this config.json."
            )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{name} {list(tensors[name].shape)} must have the model's shape {list(shape)}: config.json and "
                "tensors disagree. Pass the tensors that belong to this config.json."
            )
