"""``init_from``: a run that starts from weights of another one, or of a model folder of Hugging Face."""

import logging

from gqa_parallel.checkpoint.huggingface import load_weights
from gqa_parallel.conf.schema import Config
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.model import GQAModel
from gqa_parallel.training.model_arguments import differences, model_arguments_of, model_config_of
from gqa_parallel.training.weights import Weights, open_weights

logger = logging.getLogger(__name__)


def initial_weights(config: Config, vocab_size: int, verify: bool) -> Weights | None:
    """The weights that ``init_from`` names, seen to be those of the configured model; None: it names none.

    Args:
        config: checked.
        vocab_size: the tokenizer's or the model's, without padding.
        verify: compare the files of a checkpoint of ours with their checksums; one rank that does is enough.
    Raises:
        UserError: there are no weights, or they are of another model; says which keys to set.
    """
    if config.init_from is None:
        return None
    weights = open_weights("init_from", config.init_from, verify)
    here = model_config_of(model_arguments_of(config.model, vocab_size), config.model.name)
    there = model_config_of(weights.arguments, weights.config["model_type"])
    differing = differences(here, there)
    if differing:
        pairs = ", ".join(f"{key} {theirs} there and {ours} here" for key, (ours, theirs) in differing.items())
        overrides = " ".join(f"{key}={theirs}" for key, (_, theirs) in differing.items())
        raise UserError(
            f"init_from ({config.init_from}) must be the configured model ({config.model.name}): it has {pairs}. "
            f"Use {overrides}"
        )
    return weights


def set_weights(model: GQAModel, weights: Weights) -> None:
    """Set every parameter of this rank, which reads only its slices.

    Raises:
        UserError: the tensors are not those of the model.
    """
    load_weights(model, weights.tensors, weights.family)
    logger.info("weights from %s (%s)", weights.folder, weights.family.model_type)
