"""What is on disk under the prefix of an indexed dataset, checked before anybody trains on it. No torch here.

The ``.idx`` file: magic, version, dtype code, number of sequences S, number of document bounds, then S
lengths (int32), S byte offsets into the ``.bin`` (int64) and the bounds (int64). Source: Megatron-Core,
megatron/core/datasets/indexed_dataset.py.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gqa_parallel.data.tokenizer import Tokenizer
from gqa_parallel.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
PROBED_TOKENS = 1 << 20
PREPARE = "gqa-prepare-data source=FOLDER target={prefix}"


@dataclass(frozen=True)
class Index:
    """The ``.idx`` file of a dataset.

    Attributes:
        dtype: of the tokens.
        lengths: tokens per sequence, int32.
        tokens: their sum.
        fingerprint: equal for datasets with the same dtype and lengths.
    """

    dtype: np.dtype
    lengths: np.ndarray
    tokens: int
    fingerprint: str


def check_dataset(prefix: str, tokenizer: Tokenizer, vocab_size: int | None = None) -> Index:
    """Refuse files that training could not read, or would read as something else.

    Args:
        prefix: path of the dataset without ``.bin`` and ``.idx``.
        tokenizer: the one that training uses.
        vocab_size: ids that the model can embed; None: the tokenizer's.
    Returns:
        The index, memory-mapped.
    Raises:
        UserError: a file is missing, cut short or no indexed dataset; there are no tokens; another tokenizer
            made them; or an id among the first ``PROBED_TOKENS`` is not below ``vocab_size``.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    _check_files_exist(prefix, bin_path, idx_path)
    index = _read_index(prefix, idx_path)
    expected = index.tokens * index.dtype.itemsize
    if not index.tokens:
        raise UserError(
            f"data.paths ({prefix}) must hold at least one token: {idx_path} lists none. "
            f"Prepare it again: {PREPARE.format(prefix=prefix)} overwrite=true."
        )
    if bin_path.stat().st_size < expected:
        raise UserError(
            f"size of {bin_path} ({bin_path.stat().st_size} bytes) must be the {expected} bytes that "
            f"{idx_path} describes: the file is cut short. Copy it again, or prepare it again: "
            f"{PREPARE.format(prefix=prefix)} overwrite=true."
        )
    _check_tokenizer(prefix, tokenizer)
    _check_ids(bin_path, index, vocab_size or tokenizer.vocab_size)
    return index


def _check_files_exist(prefix: str, bin_path: Path, idx_path: Path) -> None:
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if not missing:
        return
    if prefix.endswith((".bin", ".idx")):
        fix = f"Give the prefix that both share: {prefix[:-4]}."
    else:
        fix = f"Make them with {PREPARE.format(prefix=prefix)}, or train on data=stdlib."
    raise UserError(
        f"data.paths ({prefix}) must name a pair {bin_path} and {idx_path}: {' and '.join(missing)} "
        f"{'do' if len(missing) > 1 else 'does'} not exist. {fix}"
    )


def _read_index(prefix: str, path: Path) -> Index:
    def refuse(why: str) -> UserError:
        return UserError(
            f"{path} must be the index of an indexed dataset: {why}. Copy it again, or prepare it again: "
            f"{PREPARE.format(prefix=prefix)} overwrite=true."
        )

    size = path.stat().st_size
    if size < HEADER.size:
        raise refuse(f"its {size} bytes are fewer than the header's {HEADER.size}")
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise refuse("its header is not that of the format's version 1 with integer tokens")
    expected = HEADER.size + sequences * (4 + 8) + bounds * 8
    if size < expected:
        raise refuse(f"its {size} bytes are fewer than the {expected} that its header announces")
    if not sequences:
        return Index(np.dtype(DTYPES[code]), np.empty(0, np.int32), 0, "")

    dtype = np.dtype(DTYPES[code])
    lengths = np.memmap(path, np.int32, mode="r", offset=HEADER.size, shape=(sequences,))
    ends = HEADER.size + sequences * 4 + (sequences - 1) * 8
    last_offset = int(np.memmap(path, np.int64, mode="r", offset=ends, shape=(1,))[0])
    tokens = int(lengths.sum(dtype=np.int64))
    last_bound = int(np.memmap(path, np.int64, mode="r", offset=expected - 8, shape=(1,))[0]) if bounds else 0
    if lengths.min() < 0 or last_bound != sequences or last_offset != (tokens - int(lengths[-1])) * dtype.itemsize:
        raise refuse("its lengths, offsets and document bounds contradict each other")
    return Index(dtype, lengths, tokens, hashlib.sha256(header + lengths.tobytes()).hexdigest())


def _check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """Datasets of ``gqa-prepare-data`` say what made them; others have no ``.json``, or another kind."""
    about = Path(f"{prefix}.json")
    if not about.is_file() or about.stat().st_size > 1 << 16:
        return
    try:
        made_by = json.loads(about.read_text())
        name, fingerprint = made_by["tokenizer"], made_by["tokenizer_fingerprint"]
    except (ValueError, KeyError, TypeError):
        return
    if fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer ({tokenizer.name}) must be the tokenizer of {prefix} ({name}): another one "
            f"gives its ids another meaning. Set data.tokenizer={name}, or prepare the text again."
        )


def _check_ids(bin_path: Path, index: Index, vocab_size: int) -> None:
    probed = np.memmap(bin_path, index.dtype, mode="r", shape=(min(index.tokens, PROBED_TOKENS),))
    largest = int(probed.max())
    if largest >= vocab_size:
        raise UserError(
            f"largest token id of {bin_path} ({largest}) must be < vocabulary size ({vocab_size}): the model "
            f"has no embedding for it. Set data.tokenizer to the tokenizer that made the file, or "
            f"model.vocab_size to at least {largest + 1}."
        )
