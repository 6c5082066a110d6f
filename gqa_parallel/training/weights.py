"""Weights to start from or to convert, whatever the folder is that holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gqa_parallel.checkpoint.conversion import full_tensors, huggingface_tensors
from gqa_parallel.checkpoint.families.family import Family, ModelArguments
from gqa_parallel.checkpoint.folders import CONFIG, HuggingFaceFolder, carried_files, read_config
from gqa_parallel.checkpoint.huggingface import family_of, model_arguments
from gqa_parallel.checkpoint.lazy_tensor import LazyTensor
from gqa_parallel.checkpoint.native import MANIFEST, DamagedCheckpoint, NativeCheckpoint
from gqa_parallel.checkpoint.native_weights import NativeWeights
from gqa_parallel.checkpoint.store import candidates
from gqa_parallel.conf.schema import ModelConfig
from gqa_parallel.errors import UserError
from gqa_parallel.training.huggingface_config import huggingface_config


@dataclass(frozen=True)
class Weights:
    """A model's weights, none of them read yet.

    Args:
        folder: where they are.
        config: fields of ``config.json``.
        tensors: by Hugging Face's names.
        carried: files that go with the model.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    carried: list[Path]

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def arguments(self) -> ModelArguments:
        return model_arguments(self.config)

    def full_tensors(self) -> dict[str, LazyTensor]:
        """The parameters of our model at tensor-parallel size 1.

        Raises:
            UserError: the tensors are not those of ``config.json``.
        """
        arguments = self.arguments
        return full_tensors(self.tensors, self.family, arguments.config, arguments.gpt["tie_embeddings"])


def open_weights(name: str, folder: str, verify: bool = True) -> Weights:
    """
    Args:
        name: of the key that says ``folder``.
        folder: a model folder of Hugging Face, a checkpoint of ours, or a run directory (its newest checkpoint).
        verify: compare the files of a checkpoint of ours with their checksums.
    Raises:
        UserError: it is neither, its family is unknown, or its files are not whole.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{name} ({folder}) must be a model folder of Hugging Face or a checkpoint of ours: there is no such "
            "folder, and nothing is downloaded. Check the path."
        )
    if (path / MANIFEST).is_file():
        return _of_checkpoint(path, verify)
    if complete := candidates(path / "checkpoints"):
        return _of_checkpoint(complete[0], verify)
    config = read_config(path)
    family_of(config)
    opened = HuggingFaceFolder(path)
    return Weights(path, config, opened, opened.carried)


def _of_checkpoint(path: Path, verify: bool) -> Weights:
    """
    The ``config.json`` of a converted checkpoint lies beside it. A run that was trained here has none: there it follows
    from the run's own model settings, which is all that decides what the weights mean.
    """
    checkpoint = NativeCheckpoint(path)
    if verify:
        checkpoint.verify(checkpoint.files)
    full = NativeWeights(checkpoint)
    if (path / CONFIG).is_file():
        config, carried = read_config(path), carried_files(path)
    else:
        config, carried = huggingface_config(_configured_model(checkpoint), _vocab_size(full, path)), []
    tensors = huggingface_tensors(full, family_of(config), model_arguments(config).config)
    return Weights(path, config, tensors, carried)


def _configured_model(checkpoint: NativeCheckpoint) -> ModelConfig:
    try:
        model = checkpoint.description["config"]["model"]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), model))
    except Exception as error:  # OmegaConf raises many types
        raise DamagedCheckpoint(
            f"the checkpoint {checkpoint.folder} must say which model it is of: {error}. Use another one."
        ) from error


def _vocab_size(full: Mapping[str, LazyTensor], path: Path) -> int:
    embedding = full.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise DamagedCheckpoint(f"the checkpoint {path} must hold an embedding: it has none. Use another one.")
    return embedding.shape[0]
