"""Time and peak memory of core attention, forward and backward, for each variant and sequence length.

gqa-bench
gqa-bench num_heads=32 num_kv_heads=8 head_dim=128 seq_lens=[4096,8192,16384] dtype=bf16
"""

import multiprocessing
import os
import resource
import statistics
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table

from gqa_parallel.attention.core_attention import CoreAttention
from gqa_parallel.errors import UserError
from gqa_parallel.launch.program import program
from gqa_parallel.partition.heads import HeadPartition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class BenchConfig:
    """One layer's core attention on one device."""

    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    seq_lens: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    window: int = 256  # keys, of the windowed variant
    softcap: float = 50.0
    document: int = 256  # tokens of a packed document
    dtype: str = "fp32"  # fp32 or bf16
    repeats: int = 3  # timed passes, of which the median is shown


ConfigStore.instance().store(name="bench_schema", node=BenchConfig)


@dataclass(frozen=True)
class Figures:
    """One forward and backward: seconds (median), and the peak of what it allocates, in bytes."""

    seconds: float
    peak_bytes: int


@program(BenchConfig, "bench")
def main(config: BenchConfig) -> None:
    if config.dtype not in DTYPES:
        raise UserError(f"dtype ({config.dtype}) must be fp32 or bf16: core attention is measured in these.")
    HeadPartition(config.num_heads, config.num_kv_heads, 1)
    variants: dict[str, dict[str, Any]] = {
        "causal": {},
        f"window {config.window}": {"window": config.window},
        f"soft-cap {config.softcap:g}": {"softcap": config.softcap},
        "sinks": {"num_sinks": config.num_heads},
        f"packed, {config.document} each": {"document": config.document},
    }
    console = Console(width=100)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"forward + backward of core attention: {config.num_heads} query heads, {config.num_kv_heads} KV heads, "
        f"head dim {config.head_dim}, batch {config.batch}, {config.dtype}, {device}; torch {torch.__version__}"
    )
    table = Table()
    table.add_column("variant", no_wrap=True)
    for seq_len in config.seq_lens:
        table.add_column(f"S = {seq_len:,}\nms", justify="right")
        table.add_column("\nMiB", justify="right")
    for name, variant in variants.items():
        cells = []
        for seq_len in config.seq_lens:
            figures = measured(config, variant, seq_len)
            cells += [f"{figures.seconds * 1e3:,.0f}", f"{figures.peak_bytes / 2**20:,.0f}"]
        table.add_row(name, *cells)
    scores = [config.batch * config.num_heads * seq_len**2 * 4 / 2**20 for seq_len in config.seq_lens]
    table.add_section()
    table.add_row("S x S scores, fp32", *(cell for size in scores for cell in ("", f"{size:,.0f}")))
    console.print(table)


def measured(config: BenchConfig, variant: dict[str, Any], seq_len: int) -> Figures:
    """In processes of their own, since a process never gives its peak back."""
    seconds = _in_a_process(config, variant, seq_len).seconds
    # else the C allocator keeps what was freed for later, and the peak says how fragmented that is
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        return Figures(seconds, _in_a_process(replace(config, repeats=1), variant, seq_len).peak_bytes)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _in_a_process(config: BenchConfig, variant: dict[str, Any], seq_len: int) -> Figures:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, config, variant, seq_len))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise UserError(
            f"seq_lens ({seq_len}) must fit into memory: the measuring process died. Use shorter sequences."
        ) from None
    finally:
        process.join()


def _measure(pipe: Connection, config: BenchConfig, variant: dict[str, Any], seq_len: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    variant = dict(variant)
    document = variant.pop("document", None)
    starts = torch.arange(seq_len, device=device) // document * document if document else None
    attention = CoreAttention(**variant).to(device)

    def passes(seq_len: int, starts: torch.Tensor | None) -> None:
        q, k, v = (
            torch.randn(
                seq_len,
                config.batch,
                heads,
                config.head_dim,
                device=device,
                dtype=DTYPES[config.dtype],
                requires_grad=True,
            )
            for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        )
        attention(q, k, v, starts).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    passes(64, None if starts is None else starts[:64])  # threads and libraries are there now
    before = _peak_bytes()
    seconds = []
    for repeat in range(config.repeats + 1):
        start = time.perf_counter()
        passes(seq_len, starts)
        if repeat:  # the first one warms up
            seconds.append(time.perf_counter() - start)
    pipe.send(Figures(statistics.median(seconds), _peak_bytes() - before))


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


if __name__ == "__main__":
    main()
