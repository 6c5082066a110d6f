"""The weights in a checkpoint of ours, without what else training keeps."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_parallel.checkpoint.folders import MAPPED_BYTES
from gqa_parallel.checkpoint.lazy_tensor import Index, LazyTensor
from gqa_parallel.checkpoint.native import NativeCheckpoint, Part, StoredFile, write_file, write_manifest

WEIGHT = "weight"  # the kind of tensor, as in state.py, which needs DeepSpeed
FILE_BYTES = 128 << 20  # all parts of a file are in memory while it is written


class NativeWeights(dict[str, LazyTensor]):
    """The parameters of a model at tensor-parallel size 1, in fp32, by our names.

    Args:
        checkpoint: verified by whoever doubts it.
    """

    def __init__(self, checkpoint: NativeCheckpoint) -> None:
        self._checkpoint, self._num_read = checkpoint, 0
        super().__init__(
            (
                name.removeprefix(f"{WEIGHT}/"),
                LazyTensor(tuple(about["shape"]), getattr(torch, about["dtype"]), partial(self._read, name)),
            )
            for name, about in checkpoint.tensors.items()
            if name.startswith(f"{WEIGHT}/")
        )

    def _read(self, name: str, index: Index) -> Tensor:
        if self._num_read > MAPPED_BYTES:
            self._checkpoint.close()
            self._num_read = 0
        about = self._checkpoint.tensors[name]
        shape = about["shape"]
        cuts = [*index, *[slice(None)] * (len(shape) - len(index))]
        block = [range(size)[cut] for size, cut in zip(shape, cuts, strict=True)]
        data = self._checkpoint.read(name, block, shape, getattr(torch, about["dtype"]))
        self._num_read += data.nbytes
        return data


def write_native_weights(
    path: Path,
    full: Mapping[str, LazyTensor],
    description: Mapping[str, Any],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a checkpoint of weights alone, in fp32; on return it is on the disk.

    Args:
        path: an empty folder, or one with files of other names.
        full: the parameters at tensor-parallel size 1.
        description: what the checkpoint is of; values of JSON.
        advance: told the bytes that are written.
    Raises:
        OSError: it cannot be written.
    """
    files: list[StoredFile] = []
    parts: list[Part] = []

    def finish() -> None:
        files.append(write_file(path / f"weights-{len(files):05d}.safetensors", parts))
        advance(sum(part.data.nbytes for part in parts))
        parts.clear()

    for name, tensor in full.items():
        for start, block in tensor.blocks():
            parts.append(Part(f"{WEIGHT}/{name}", tensor.shape, 0, start, block.float()))
            if sum(part.data.nbytes for part in parts) >= FILE_BYTES:
                finish()
    if parts:
        finish()
    write_manifest(path, description, files)
