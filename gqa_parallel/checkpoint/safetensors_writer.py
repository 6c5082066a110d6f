"""A safetensors file written tensor by tensor: the library's own writer wants all of them in memory.

Format: the header's length (8 bytes, little-endian), a JSON header with dtype, shape and place of every tensor, and
the data (https://github.com/huggingface/safetensors).
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gqa_parallel.checkpoint.lazy_tensor import LazyTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a file; on return it is on the disk. A block of a tensor is in memory at a time.

    Args:
        path: of the file.
        tensors: by name.
        dtype: of all tensors in the file; None: each one's own.
        advance: told the bytes after each block.
    Raises:
        OSError: it cannot be written.
    """
    # the widest first, so that every tensor is aligned, as the library does
    tensors = dict(sorted(tensors.items(), key=lambda item: -(dtype or item[1].dtype).itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        stored = dtype or tensor.dtype
        size = torch.Size(tensor.shape).numel() * stored.itemsize
        header[name] = {
            "dtype": _NAMES[stored],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            for _, block in tensor.blocks():
                block = block.to(dtype or tensor.dtype).contiguous()
                file.write(block.flatten().view(torch.uint8).numpy())
                advance(block.nbytes)
        file.flush()
        os.fsync(file.fileno())
