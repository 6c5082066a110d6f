"""The format of our checkpoints: full tensors in parts, free of any parallel layout, in files with checksums.

A folder holds safetensors files (no pickle) and ``checkpoint.json``, the manifest: what the checkpoint is of, which
files belong to it with size and SHA-256, and which range of which full tensor each file holds. Whoever reads asks for
any block of a full tensor and gets it from the files that have it.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gqa_parallel.errors import UserError

MANIFEST = "checkpoint.json"
FORMAT, VERSION = "gqa_parallel", 1
_RESERVED = ("format", "version", "files", "tensors", "sha256")


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written."""


def damaged(folder: Path, problem: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"the checkpoint {folder} must be whole: {problem}. Resume from another step, or use resume=none."
    )


@dataclass(frozen=True)
class Part:
    """A range of a full tensor.

    Args:
        name: of the full tensor.
        shape: of the full tensor; at least one dimension.
        dim: the dimension that is cut into parts.
        start: the first index of the part along ``dim``.
        data: the part, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    data: Tensor


@dataclass(frozen=True)
class StoredPart:
    """Where the manifest says that a part is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint."""

    name: str
    size: int
    sha256: str
    parts: tuple[StoredPart, ...]


def write_file(path: Path, parts: Iterable[Part]) -> StoredFile:
    """Write parts of full tensors; on return they are on the disk.

    Raises:
        OSError: it cannot be written.
    """
    tensors, stored = {}, []
    for part in parts:
        stop = part.start + part.data.shape[part.dim]
        dtype = str(part.data.dtype).removeprefix("torch.")
        stored.append(StoredPart(part.name, dtype, tuple(part.shape), part.dim, part.start, stop))
        tensors[_key(part.name, part.start, stop)] = part.data.contiguous()
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how it passes on what the operating system says
        raise _as_os_error(error, path) from error
    path.chmod(mode)  # safetensors leaves it to its owner alone
    flush(path)
    return StoredFile(path.name, path.stat().st_size, _sha256(path), tuple(stored))


def write_manifest(folder: Path, description: Mapping[str, Any], files: Iterable[StoredFile]) -> None:
    """Write ``checkpoint.json`` and flush the folder. With it the checkpoint is readable.

    Args:
        folder: holds the files.
        description: what the checkpoint is of; values of JSON.
        files: all that belong to it.
    Raises:
        OSError: it cannot be written.
        ValueError: the parts do not cover each full tensor once.
    """
    files = sorted(files, key=lambda file: file.name)
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        for part in file.parts:
            tensor = tensors.setdefault(
                part.name, {"dtype": part.dtype, "shape": list(part.shape), "dim": part.dim, "parts": []}
            )
            tensor["parts"].append([part.start, part.stop, file.name])
    for name, tensor in tensors.items():
        tensor["parts"].sort()
        if not _covers(tensor):
            raise ValueError(f"the parts of {name} {tensor['shape']} are {tensor['parts']}")
    content = {
        **description,
        "format": FORMAT,
        "version": VERSION,
        "files": {file.name: {"size": file.size, "sha256": file.sha256} for file in files},
        "tensors": tensors,
    }
    content["sha256"] = _digest(content)
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Put the folder's names on the disk."""
    flush(folder)


class NativeCheckpoint:
    """A checkpoint that is read; opening it reads the manifest only.

    Args:
        folder: holds ``checkpoint.json``.
    Raises:
        DamagedCheckpoint: there is no manifest of this version, or it is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = (content.get("format"), content.get("version"))
        except (OSError, ValueError, AttributeError) as error:
            raise damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
        if version != (FORMAT, VERSION):
            raise damaged(folder, f"{MANIFEST} is of format {version[0]} {version[1]}, not {FORMAT} {VERSION}")
        if content.pop("sha256", None) != _digest(content):
            raise damaged(folder, f"{MANIFEST} is not as it was written")
        self.description: dict[str, Any] = {key: value for key, value in content.items() if key not in _RESERVED}
        self.tensors: dict[str, dict[str, Any]] = content["tensors"]
        self._files: dict[str, dict[str, Any]] = content["files"]
        self._open: dict[str, safe_open] = {}

    @property
    def files(self) -> list[str]:
        return list(self._files)

    def verify(self, names: Sequence[str]) -> None:
        """Compare files with their checksums.

        Args:
            names: of ``files``.
        Raises:
            DamagedCheckpoint: names the first file that is missing or not as it was written.
        """
        for name in names:
            path, expected = self.folder / name, self._files[name]
            if not re.fullmatch(r"[\w.-]+", name) or not path.is_file():
                raise damaged(self.folder, f"{name} is missing")
            try:
                size = path.stat().st_size
                if size != expected["size"]:
                    raise damaged(self.folder, f"{name} has {size:,} of {expected['size']:,} bytes")
                if _sha256(path) != expected["sha256"]:
                    raise damaged(self.folder, f"{name} is not as it was written (SHA-256)")
            except OSError as error:
                raise damaged(self.folder, f"{name} cannot be read ({error.strerror})") from error

    def read(self, name: str, block: Sequence[range], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A block of a full tensor, from as many files as have a part of it.

        Args:
            name: of the full tensor.
            block: the indices along each dimension.
            shape, dtype: that the full tensor must have.
        Raises:
            DamagedCheckpoint: it has another shape or dtype, is missing or cannot be read.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise damaged(self.folder, f"it has no tensor {name}")
        expected = {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        for key, value in expected.items():
            if tensor[key] != value:
                raise damaged(self.folder, f"the {key} of {name} is {tensor[key]}, not {value}")
        dim, out = tensor["dim"], torch.empty([len(indices) for indices in block], dtype=dtype)
        for start, stop, file in tensor["parts"]:
            first, last = max(start, block[dim].start), min(stop, block[dim].stop)
            if first < last:
                index = [slice(indices.start, indices.stop) for indices in block]
                index[dim] = slice(first - start, last - start)
                data = self._slice(file, _key(name, start, stop), tuple(index))
                if data.dtype != dtype or data.shape[dim] != last - first:
                    raise damaged(self.folder, f"{file} holds another {name} than {MANIFEST} says")
                out.narrow(dim, first - block[dim].start, last - first).copy_(data)
        return out

    def read_whole(self, name: str) -> Tensor:
        """A full tensor as it is."""
        if name not in self.tensors:
            raise damaged(self.folder, f"it has no tensor {name}")
        shape, dtype = self.tensors[name]["shape"], getattr(torch, self.tensors[name]["dtype"])
        return self.read(name, [range(size) for size in shape], shape, dtype)

    def close(self) -> None:
        """Let go of the files: the pages that were read of them stay in memory until then."""
        self._open.clear()

    def _slice(self, file: str, key: str, index: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(key)[index]
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            raise damaged(self.folder, f"{file} cannot be read ({error})") from error


def _key(name: str, start: int, stop: int) -> str:
    return f"{name}[{start}:{stop}]"


def _covers(tensor: Mapping[str, Any]) -> bool:
    end = 0
    for start, stop, _ in tensor["parts"]:
        if start != end:
            return False
        end = stop
    return end == tensor["shape"][tensor["dim"]]


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON values, whatever their order and spaces."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Put a file or a folder's names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    code = re.search(r"os error (\d+)", str(error))
    number = int(code.group(1)) if code else errno.EIO
    return OSError(number, os.strerror(number) if code else str(error), str(path))
