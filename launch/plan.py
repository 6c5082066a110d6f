"""``gqa-plan``: what a configuration costs and which rank holds which heads, before anything runs.

Takes every key of ``gqa-train``, and the number of ranks:

    gqa-plan model=llama3.1_70b parallel.tp=16 world_size=64
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hydra.core.config_store import ConfigStore
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from gqa_parallel.conf import schema
from gqa_parallel.conf.checks import check
from gqa_parallel.conf.model_shape import model_shape
from gqa_parallel.conf.schema import Config, Precision
from gqa_parallel.data.sampler import micro_batches_per_step
from gqa_parallel.data.tokenizer import load_tokenizer
from gqa_parallel.launch.program import program
from gqa_parallel.partition import cost
from gqa_parallel.partition.cost import ModelShape
from gqa_parallel.partition.heads import HeadPartition

PIPED_WIDTH = 100  # columns
FIRST_RANKS, LAST_RANKS = 12, 4  # rows of a long head table


@dataclass
class PlanConfig(Config):
    world_size: int | None = None  # ranks of the run; null: parallel.tp x parallel.cp


schema.register()
ConfigStore.instance().store(name="schema", node=PlanConfig)


@program(PlanConfig, "config")
def main(config: PlanConfig) -> None:
    world_size = config.parallel.tp * config.parallel.cp if config.world_size is None else config.world_size
    check(config, world_size)
    plan = Plan.of(config, world_size)
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    for section in (summary, heads, parameters, memory, kv_cache, collectives, training):
        console.print()
        console.print(section(plan))


@dataclass(frozen=True)
class Plan:
    """A configuration in the terms of the cost model."""

    config: Config
    shape: ModelShape
    partition: HeadPartition
    world_size: int
    dp_size: int
    fullest_rank: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> "Plan":
        tp_size = config.parallel.tp
        vocab_size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
        shape = model_shape(config.model, vocab_size, tp_size)
        partition = shape.partition(tp_size)
        dp_size = world_size // (tp_size * config.parallel.cp)
        return cls(config, shape, partition, world_size, dp_size, cost.fullest_rank(shape, partition))

    @property
    def mixed_precision(self) -> bool:
        return self.config.train.precision is not Precision.fp32

    @property
    def bytes_per_element(self) -> int:
        return 2 if self.mixed_precision else 4

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.config.train.micro_batch_size * self.config.train.seq_len


def summary(plan: Plan) -> str:
    shape, config = plan.shape, plan.config
    precision = config.train.precision
    return (
        f"[bold]{config.model.name}[/]: {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_heads} query heads, {shape.num_kv_heads} KV heads, head dim {shape.head_dim},\n"
        f"  MLP {shape.ffn_hidden_size}, vocabulary {shape.vocab_size} (padded), "
        f"{cost.parameter_counts(shape).total:,} parameters\n"
        f"world size {plan.world_size} = tp {plan.partition.tp_size} x dp {plan.dp_size}, "
        f"sequence parallel {'on' if config.parallel.sequence_parallel else 'off'}, "
        f"ZeRO stage {config.zero.stage}, {'bf16 (auto)' if precision is Precision.auto else precision.value}"
    )


def heads(plan: Plan) -> RenderableType:
    partition = plan.partition
    most = max(len(partition.query_heads(rank)) for rank in range(partition.tp_size))
    table = _table("rank", "query heads", "count", "KV heads", "count", "replicas on ranks")
    for rank in _first_and_last(partition.tp_size):
        if rank is None:
            table.add_row(*["..."] * len(table.columns))
            continue
        query_heads, kv_heads = partition.query_heads(rank), partition.kv_heads(rank)
        replicas = partition.kv_replica_ranks(rank)
        table.add_row(
            str(rank),
            _span(query_heads),
            str(len(query_heads)),
            _span(kv_heads),
            str(len(kv_heads)),
            _span(replicas) if len(replicas) > 1 else "-",
        )
    return _section(
        "Heads of each tensor-parallel rank",
        table,
        f"imbalance {partition.imbalance:.2f}: the fullest rank has {most} query heads, "
        f"the mean is {partition.num_heads / partition.tp_size:.4g}",
    )


def parameters(plan: Plan) -> RenderableType:
    shape, partition = plan.shape, plan.partition
    model = cost.parameter_counts(shape)
    ranks = [cost.parameter_counts(shape, partition, rank) for rank in range(partition.tp_size)]
    fullest = ranks[plan.fullest_rank]
    replicated = sum(rank.total for rank in ranks) - model.total
    table = _table("part", "model", f"rank {plan.fullest_rank}")
    for part in ("embedding", "attention", "mlp", "norms", "output"):
        table.add_row(part, f"{getattr(model, part):,}", f"{getattr(fullest, part):,}")
    table.add_row("total", f"{model.total:,}", f"{fullest.total:,}", style="bold")
    return _section(
        f"Parameters, and those of the fullest rank ({plan.fullest_rank})",
        table,
        f"what ranks share adds {replicated:,} parameters over all tensor-parallel ranks "
        f"({replicated / model.total:.2%})",
    )


def memory(plan: Plan) -> RenderableType:
    config = plan.config
    table = _table("ZeRO stage", "parameters", "gradients", "optimizer", "activations", "total")
    for stage in range(4):
        used = cost.rank_memory(
            plan.shape,
            plan.partition,
            dp_size=plan.dp_size,
            zero_stage=stage,
            mixed_precision=plan.mixed_precision,
            num_tokens=plan.tokens_per_micro_batch,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.train.recompute.value,
        )
        sizes = (used.parameters, used.gradients, used.optimizer, used.activations, used.total)
        configured = stage == config.zero.stage
        table.add_row(
            f"{'>' if configured else ' '} {stage}",
            *map(_size, sizes),
            style="bold" if configured else None,
        )
    only_fp32 = "\n  stage 0 runs in fp32 only" if plan.mixed_precision else ""
    return _section(
        f"Memory of rank {plan.fullest_rank}, > as configured",
        table,
        f"activations: estimate, one micro-batch, fused kernels; no communication buffers{only_fp32}",
    )


def kv_cache(plan: Plan) -> RenderableType:
    seq_len = plan.config.train.seq_len
    mha = replace(plan.shape, num_kv_heads=plan.shape.num_heads)
    table = _table("", "per token", f"per {seq_len:,} tokens", f"MHA, per {seq_len:,} tokens", "MHA / this")
    for name, tp_size in (("model", 1), ("fullest rank", plan.partition.tp_size)):
        this, with_mha = _most_kv_cache(plan.shape, tp_size), _most_kv_cache(mha, tp_size)
        table.add_row(name, _size(this), _size(this * seq_len), _size(with_mha * seq_len), f"{with_mha / this:.3g} x")
    return _section("KV cache in 16 bits", table)


def collectives(plan: Plan) -> RenderableType:
    per_layer = cost.layer_collectives(
        plan.shape, plan.partition, plan.tokens_per_micro_batch, plan.config.parallel.sequence_parallel
    )
    title = "Tensor-parallel collectives of one layer and micro-batch"
    if not per_layer:
        return _section(title, "none: one rank")
    table = _table("part", "phase", "collective", "tensor", "ranks", "payload", "sent per rank")
    for collective in per_layer:
        table.add_row(
            collective.part,
            collective.phase,
            collective.operation,
            collective.tensor,
            str(collective.num_ranks),
            _size(collective.num_elements * plan.bytes_per_element),
            _size(collective.sent_elements * plan.bytes_per_element),
        )
    sent = sum(collective.sent_elements for collective in per_layer) * plan.bytes_per_element
    return _section(
        title,
        table,
        f"sent per rank, in a ring: {_size(sent)} per layer, {_size(sent * plan.shape.num_layers)} in all",
    )


def training(plan: Plan) -> RenderableType:
    train = plan.config.train
    micro_batches = micro_batches_per_step(train.global_batch_size, train.micro_batch_size, plan.dp_size)
    tokens = train.global_batch_size * train.seq_len
    flops = tokens * cost.model_flops_per_token(plan.shape, train.seq_len)
    table = _table("", "per step", f"run of {train.steps:,} steps")
    for name, per_step in (
        ("micro-batches per rank", micro_batches),
        ("sequences", train.global_batch_size),
        ("tokens", tokens),
    ):
        table.add_row(name, f"{per_step:,}", f"{per_step * train.steps:,}")
    table.add_row("model FLOPs", f"{flops:.3e}", f"{flops * train.steps:.3e}")
    return _section("Training", table)


def _most_kv_cache(shape: ModelShape, tp_size: int) -> int:
    partition = shape.partition(tp_size)
    return max(cost.kv_cache_bytes_per_token(shape, partition, rank) for rank in range(tp_size))


def _section(title: str, body: RenderableType, note: str | None = None) -> Group:
    lines = [f"[bold]{title}[/]", Padding(body, (0, 0, 0, 2), expand=False)]
    return Group(*lines, *([f"  {note}"] if note else []))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _first_and_last(tp_size: int) -> Iterator[int | None]:
    """The ranks to show; None stands for those left out."""
    if tp_size <= FIRST_RANKS + LAST_RANKS:
        yield from range(tp_size)
        return
    yield from range(FIRST_RANKS)
    yield None
    yield from range(tp_size - LAST_RANKS, tp_size)


def _span(indices: range) -> str:
    return str(indices.start) if len(indices) == 1 else f"{indices.start}-{indices.stop - 1}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


if __name__ == "__main__":
    main()
