"""Hugging Face's model folders: ``config.json``, weights in safetensors files, and the tokenizer's files."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gqa_parallel.checkpoint.lazy_tensor import Index, LazyTensor
from gqa_parallel.checkpoint.native import flush
from gqa_parallel.checkpoint.safetensors_writer import DTYPES, write_safetensors
from gqa_parallel.errors import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # what transformers, too, writes into one file
MAPPED_BYTES = 64 << 20

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_CARRIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


class HuggingFaceFolder(Mapping[str, LazyTensor]):
    """The tensors of a model folder by name; opening it reads ``config.json`` and the files' headers.

    Args:
        path: of the folder.
    Raises:
        UserError: it is no model folder, its weights are pickles, or a file is missing or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self._file_of: dict[str, Path] = {}
        self._tensors: dict[str, LazyTensor] = {}
        self._mapped: tuple[Path, Any, int] | None = None  # a file, the library's handle, bytes read through it
        for file in _weight_files(path):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 the handle is no mapping
                        tensor = handle.get_slice(name)
                        self._file_of[name] = file
                        dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                        if dtype not in DTYPES or not shape:
                            raise UserError(
                                f"the dtype of {name} ({dtype} {list(shape)}) must be one of {', '.join(DTYPES)}, with "
                                "a shape: quantised weights cannot be trained. Save the model unquantised."
                            )
                        self._tensors[name] = LazyTensor(shape, DTYPES[dtype], partial(self._read, name))
            except (OSError, SafetensorError) as error:
                raise _unreadable(file, error) from error
        if not self._tensors:
            raise UserError(f"source ({path}) must hold tensors: its weight files are empty. Save the model again.")

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def carried(self) -> list[Path]:
        """What a converted folder takes along: tokenizer, generation settings, licence."""
        return carried_files(self.path)

    def _read(self, name: str, index: Index) -> Tensor:
        file = self._file_of[name]
        try:
            if self._mapped is None or self._mapped[0] != file or self._mapped[2] > MAPPED_BYTES:
                # pages of a mapped file stay in memory until it is closed
                self._mapped = None
                self._mapped = (file, safe_open(file, framework="pt"), 0)
            _, handle, num_read = self._mapped
            block = handle.get_slice(name)[index]
            self._mapped = (file, handle, num_read + block.nbytes)
            return block
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a folder's ``config.json``.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"source ({path}) must be a model folder of Hugging Face or a checkpoint of ours: it holds neither "
            f"{CONFIG} nor checkpoint.json. Give such a folder."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG} must be a JSON object: {error}. Repair it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} must be a JSON object: it is a {type(config).__name__}. Repair it.")
    return config


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    carried: Iterable[Path] = (),
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder; on return it is on the disk.

    Args:
        path: an empty folder.
        config: fields of ``config.json``.
        tensors: by Hugging Face's names.
        carried: files to copy.
        dtype: of the tensors in the files; None: each one's own.
        advance: told the bytes that are written.
        shard_bytes: at which a file ends; a larger tensor has one of its own.
    Raises:
        OSError: it cannot be written.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.num_bytes // tensor.dtype.itemsize * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + num_bytes, total + num_bytes
    if len(shards) == 1:
        write_safetensors(path / WEIGHTS, shards[0], dtype, advance)
    else:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(path / file, shard, dtype, advance)
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_companions(path, config, carried)


def write_companions(path: Path, config: Mapping[str, Any], carried: Iterable[Path]) -> None:
    """What makes weights a model: ``config.json``, and copies of the files ``carried``.

    Raises:
        OSError: it cannot be written.
    """
    for file in carried:
        shutil.copyfile(file, path / file.name)
        flush(path / file.name)
    _write_json(path / CONFIG, config)


def refuse_existing(target: Path) -> None:
    """
    Raises:
        UserError: something is there.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"target ({target}) must be new: it exists. Give another, or remove it first.")


@contextlib.contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """An empty folder to write into, which gets its name when the context ends well, and else vanishes.

    Args:
        target: the folder's name; nothing may be there.
    Raises:
        UserError: the name is taken, or the disk refuses.
    """
    refuse_existing(target)
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
        flush(folder)
        folder.rename(target)
        flush(target.parent)
    except OSError as error:
        raise UserError(
            f"target ({target}) must be writable: {error.strerror or error}. Give another place, or make room there."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, while standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total_bytes)
        yield partial(bar.advance, task)


def carried_files(path: Path) -> list[Path]:
    """The files of a folder that belong to a model besides ``config.json`` and weights, as far as they hold no code."""
    return sorted(
        file
        for file in path.iterdir()
        if file.is_file()
        and file.name not in (CONFIG, "checkpoint.json")
        and not file.name.endswith(".index.json")
        and (file.suffix in _CARRIED_SUFFIXES or file.name.startswith(_CARRIED_NAMES))
    )


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if not index.exists():
        if (path / WEIGHTS).is_file():
            return [path / WEIGHTS]
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise UserError(
                f"source ({path}) must hold its weights as safetensors: {', '.join(pickles)} can run code when it is "
                "read. Save it on a machine that trusts it: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW)."
            )
        raise UserError(
            f"source ({path}) must hold {WEIGHTS} or {INDEX}: there are no weights. Fetch the whole folder."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [path / name for name in names if Path(name).name == name]  # an index must not lead elsewhere
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} must map tensors to files: it cannot be read ({error}). Fetch it again.") from error
    missing = [name for name in names if path / name not in files or not (path / name).is_file()]
    if missing:
        raise UserError(f"source ({path}) must hold every file of {INDEX}: {', '.join(missing)} missing. Fetch them.")
    return files


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} must be a whole safetensors file: it cannot be read ({error}). Fetch it again.")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
