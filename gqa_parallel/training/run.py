"""One training run from a configuration to its results."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from gqa_parallel.conf.checks import check
from gqa_parallel.conf.model_shape import model_shape
from gqa_parallel.conf.schema import Config
from gqa_parallel.data.datasets import Datasets, build_datasets
from gqa_parallel.data.loader import build_loader
from gqa_parallel.data.sampler import GlobalBatchSampler
from gqa_parallel.data.stdlib_corpus import stdlib_corpus
from gqa_parallel.data.tokenizer import Tokenizer, load_tokenizer
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.model import GQAModel
from gqa_parallel.partition.cost import ModelShape, model_flops_per_token, parameter_counts
from gqa_parallel.partition.heads import HeadPartition
from gqa_parallel.training import checkpoint
from gqa_parallel.training.build import build_trainee, precision_of
from gqa_parallel.training.distributed import agree, from_rank_0, process_groups, raise_together, seed_everything
from gqa_parallel.training.history import History
from gqa_parallel.training.initial_weights import initial_weights, set_weights
from gqa_parallel.training.logs import logging_to
from gqa_parallel.training.loop import Loop, Progress
from gqa_parallel.training.metrics import Throughput, bits_per_byte, peak_memory_gib, perplexity, this_device_peak_flops
from gqa_parallel.training.observers import Observers
from gqa_parallel.training.plot import plot_loss
from gqa_parallel.training.progress import ProgressDisplay, RunSummary, print_summary
from gqa_parallel.training.run_dir import resolve_run_dir, write_hydra_record
from gqa_parallel.training.run_lock import sole_run
from gqa_parallel.training.saver import Saver
from gqa_parallel.training.signals import StopSignal
from gqa_parallel.training.tracking import Tracker, start_tracking
from gqa_parallel.training.world import World

logger = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Train as ``config`` says, on every rank.

    Whatever a user can get wrong is found before the first collective where one rank can see it, and right after the
    process groups exist where only several can.

    Raises:
        UserError: with the values and a way out.
    """
    started = time.perf_counter()
    world = World.from_environment()
    check(config, world.size, torch.cuda.is_available())
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = _vocab_size(config, tokenizer)
    datasets = _datasets(config, tokenizer, vocab_size)
    shape = model_shape(config.model, vocab_size, config.parallel.tp)
    resolved = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(process_groups(world, tp_size=config.parallel.tp, timeout_s=config.parallel.timeout_s))
        run_dir = resolve_run_dir(config.run_dir, config.model.name, from_rank_0)
        stack.enter_context(logging_to(run_dir, world.rank, config.debug.log_level))
        agree({**_flat(resolved), "the corpus": datasets.fingerprint})
        stack.enter_context(sole_run(run_dir))
        identity = _identity(config, resolved, vocab_size, datasets)
        found = checkpoint.find(config.resume, run_dir, identity)
        if world.rank == 0:
            write_hydra_record(run_dir, resolved, [a for a in sys.argv[1:] if not a.startswith("--")])
            _announce(config, run_dir, shape, world)

        seed_everything(config.train.seed)
        trainee = build_trainee(config, vocab_size, _initialize(config, vocab_size, world, found is not None))
        progress = Progress()
        if found is not None:
            checkpoint.load(found, trainee, config.train.seed)
            progress = Progress(step=found.description.step, best_val_loss=found.description.best_val_loss)
            logger.info("resumed from %s", found.folder)
            if progress.step >= config.train.steps:
                logger.warning("nothing is left to train: train.steps (%d) are done", config.train.steps)

        throughput = _throughput(config, shape, world)
        observers = stack.enter_context(_observers(config, run_dir, resolved, found, world))
        sampler, validation = _samplers(config, datasets, progress.step)
        loop = Loop(
            config=config,
            trainee=trainee,
            train_batches=build_loader(
                datasets.train, sampler, config.data.num_workers, pin_memory=torch.cuda.is_available()
            ),
            validation=validation,
            micro_batches=sampler.micro_batches,
            eod=tokenizer.eod,
            byte_level=tokenizer.is_byte_level,
            throughput=throughput,
            observers=observers,
            stop=stack.enter_context(StopSignal()),
            saver=Saver(run_dir, config.checkpoint),
            identity=identity,
            resolved=resolved,
        )
        logger.info("set up in %.1f s", time.perf_counter() - started)
        with observers.display or contextlib.nullcontext():
            progress = loop.run(progress)
        if world.rank == 0:
            _conclude(config, run_dir, progress, throughput, observers, tokenizer, started)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as one writes overrides."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size ({vocab_size}) must be at least the tokenizer's ({tokenizer.vocab_size}, "
            f"{tokenizer.name}): each token needs a row of the embedding. Use model.vocab_size=null."
        )
    return vocab_size


def _datasets(config: Config, tokenizer: Tokenizer, vocab_size: int) -> Datasets:
    data, train = config.data, config.train
    return build_datasets(
        data.paths or [stdlib_corpus(data.tokenizer, data.cache_dir)],
        tokenizer,
        seq_len=train.seq_len,
        train_samples=train.steps * train.global_batch_size,
        valid_samples=train.eval_batches * train.global_batch_size,
        seed=train.seed,
        weights=data.weights,
        split=data.split,
        cache_dir=data.cache_dir,
        vocab_size=vocab_size,
    )


def _identity(
    config: Config, resolved: dict[str, Any], vocab_size: int, datasets: Datasets
) -> dict[str, dict[str, Any]]:
    """What a checkpoint must share with the run that resumes it."""
    meaningless = ("name", "attention_dropout", "hidden_dropout", "init_std", "max_position_embeddings")
    model = {key: value for key, value in _flat(resolved["model"]).items() if key not in meaningless}
    return {
        "model": {**model, "vocab_size": vocab_size},
        "data": {
            "seed": config.train.seed,
            "seq_len": config.train.seq_len,
            "global_batch_size": config.train.global_batch_size,
            "tokenizer": config.data.tokenizer,
            "corpus": datasets.corpus,
            "weights": config.data.weights,
            "split": config.data.split,
        },
    }


def _initialize(config: Config, vocab_size: int, world: World, resumed: bool) -> Callable[[GQAModel], None]:
    """What sets the weights of ``init_from``, unless a checkpoint will.

    Raises:
        UserError: on every rank.
    """
    if resumed:
        if config.init_from is not None:
            logger.info("init_from (%s) is not read: a checkpoint is resumed", config.init_from)
        return lambda model: None
    weights, error = None, None
    try:
        weights = initial_weights(config, vocab_size, verify=world.rank == 0)
    except UserError as raised:
        error = raised
    raise_together(error)
    return (lambda model: None) if weights is None else partial(set_weights, weights=weights)


def _announce(config: Config, run_dir: Path, shape: ModelShape, world: World) -> None:
    partition = HeadPartition(config.model.num_heads, config.model.num_kv_heads, config.parallel.tp)
    count = parameter_counts(shape).total
    logger.info("%s: %s parameters, %s ranks, run directory %s", config.model.name, f"{count:,}", world.size, run_dir)
    logger.info(
        "heads: %d query, %d KV over tp %d%s, imbalance %.2f; ZeRO stage %d, %s",
        partition.num_heads,
        partition.num_kv_heads,
        partition.tp_size,
        " (KV heads replicated)" if partition.replicates_kv else "",
        partition.imbalance,
        config.zero.stage,
        precision_of(config),
    )


def _throughput(config: Config, shape: ModelShape, world: World) -> Throughput:
    tokens = config.train.global_batch_size * config.train.seq_len
    return Throughput(
        tokens_per_step=tokens,
        flops_per_step=tokens * model_flops_per_token(shape, config.train.seq_len),
        num_devices=world.size,
        peak_flops=this_device_peak_flops(),
    )


@contextlib.contextmanager
def _observers(
    config: Config,
    run_dir: Path,
    resolved: dict[str, Any],
    found: checkpoint.Found | None,
    world: World,
):
    """Rank 0's screen, metrics file and W&B run; a run that fails is marked as failed."""
    if world.rank != 0:
        yield Observers(wandb_run_id=None)
        return
    partition = HeadPartition(config.model.num_heads, config.model.num_kv_heads, config.parallel.tp)
    head_table = [
        {
            "tp_rank": rank,
            "query_heads": str(list(partition.query_heads(rank))),
            "kv_heads": str(list(partition.kv_heads(rank))),
            "kv_replica_ranks": str(list(partition.kv_replica_ranks(rank))),
        }
        for rank in range(partition.tp_size)
    ]
    # a run that goes on from another run's checkpoint is a new one
    goes_on = found is not None and found.folder.parents[1] == run_dir
    resumed_id = found.description.wandb_run_id if goes_on else None
    tracker: Tracker = start_tracking(config.wandb, run_dir, resolved, head_table, resumed_id)
    history = History(run_dir, resumed_step=found.description.step if found else None)
    first_step = found.description.step if found else 0
    try:
        yield Observers(ProgressDisplay(config.train.steps, first_step), history, tracker, tracker.run_id)
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    finally:
        history.close()
    tracker.finish()


def _samplers(config: Config, datasets: Datasets, step: int):
    """This rank's training sampler, from ``step`` on, and its loader of one evaluation."""
    train, dp_group = config.train, parallel_state.get_data_parallel_group()

    def sampler(num_samples: int, consumed_samples: int = 0) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            num_samples,
            train.global_batch_size,
            train.micro_batch_size,
            dp_rank=dp_group.rank(),
            dp_size=dp_group.size(),
            consumed_samples=consumed_samples,
        )

    validation = None
    if datasets.validation is not None and train.eval_batches:
        validation = build_loader(datasets.validation, sampler(train.eval_batches * train.global_batch_size))
    return sampler(train.steps * train.global_batch_size, step * train.global_batch_size), validation


def _conclude(
    config: Config,
    run_dir: Path,
    progress: Progress,
    throughput: Throughput,
    observers: Observers,
    tokenizer: Tokenizer,
    started: float,
) -> None:
    """The plot, W&B's summary and the table."""
    try:
        plot = plot_loss(run_dir)
    except Exception as error:  # a picture must not fail a run
        plot = None
        logger.warning("loss.png was not drawn: %s", error)
    readable = bits_per_byte if tokenizer.is_byte_level else perplexity
    summary = {
        "train/loss": progress.train_loss,
        "val/loss": progress.val_loss,
        "val/best_loss": progress.best_val_loss,
        "perf/mean_tokens_per_s": throughput.mean_tokens_per_s,
    }
    observers.tracker.summary({name: value for name, value in summary.items() if value is not None})
    files = {
        "run directory": run_dir,
        "metrics": run_dir / "metrics.jsonl",
        "plot": plot or "not drawn",
        "W&B": observers.tracker.where or "off",
    }
    print_summary(
        RunSummary(
            steps=progress.step,
            tokens=progress.step * config.train.global_batch_size * config.train.seq_len,
            seconds=time.perf_counter() - started,
            train_loss=progress.train_loss,
            best_val_loss=progress.best_val_loss,
            last_val_loss=progress.val_loss,
            readable=readable,
            readable_name="bits per byte" if tokenizer.is_byte_level else "perplexity",
            tokens_per_s=throughput.mean_tokens_per_s,
            peak_memory_gib=peak_memory_gib(),
            files=files,
        )
    )
