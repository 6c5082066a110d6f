"""The training loop: steps, evaluation, checkpoints."""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gqa_parallel.checkpoint import state
from gqa_parallel.conf.schema import Config
from gqa_parallel.deepspeed.copies import differing_copies
from gqa_parallel.errors import UserError
from gqa_parallel.training import checkpoint
from gqa_parallel.training.build import Trainee
from gqa_parallel.training.distributed import mean_over_ranks
from gqa_parallel.training.metrics import Throughput, loss_metrics, peak_memory_gib
from gqa_parallel.training.observers import Observers
from gqa_parallel.training.packing import packed_documents
from gqa_parallel.training.saver import Saver, library_versions
from gqa_parallel.training.signals import StopSignal

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        train_loss, val_loss, best_val_loss: nats per token; None before the first.
    """

    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None


@dataclass(frozen=True)
class Loop:
    """Everything that the steps need; ``run`` does them.

    Args:
        config: checked.
        trainee: what learns.
        train_batches: this rank's micro-batches from the resumed step on.
        validation: this rank's micro-batches of one evaluation, the same each time; None: no validation data.
        micro_batches: forward passes per optimizer step.
        eod: the token that ends a document.
        byte_level: the tokens are bytes: losses are also given as bits per byte, else as perplexity.
        throughput: turns steps into rates.
        observers: who is told; on rank 0, others tell nobody.
        stop: asked to stop by a signal.
        saver: writes the checkpoints.
        identity: ``model`` and ``data`` of the checkpoints' description.
        resolved: the resolved configuration, as checkpoints record it.
    """

    config: Config
    trainee: Trainee
    train_batches: DataLoader
    validation: DataLoader | None
    micro_batches: int
    eod: int
    byte_level: bool
    throughput: Throughput
    observers: Observers
    stop: StopSignal
    saver: Saver
    identity: dict[str, Any]
    resolved: dict[str, Any]

    def run(self, progress: Progress) -> Progress:
        """Train from ``progress.step`` to ``train.steps``, or until a signal asks to stop.

        Raises:
            UserError: the loss is not finite, or a checkpoint cannot be written.
        """
        train = self.config.train
        batches = iter(self.train_batches)
        while progress.step < train.steps:
            loss = self._optimizer_step(batches)
            progress.step += 1
            last = progress.step == train.steps
            stopping = False
            if progress.step % train.log_interval == 0 or last:
                progress.train_loss, stopped, written = mean_over_ranks(
                    loss, self.stop.as_tensor(loss.device), self.saver.written(loss.device)
                )
                stopping = stopped > 0
                if written == 1:
                    self.saver.finish()
                self._report_step(progress)
            if self.config.debug.check_shared_parameters:
                self._check_shared_parameters(progress.step)
            stopping = stopping and not last
            if _due(progress.step, train.eval_interval, last):
                self._evaluate(progress)
            if stopping or _due(
                progress.step, self.config.checkpoint.interval, last and self.config.checkpoint.save_final
            ):
                self._save(progress)
            if stopping:
                logger.warning("stopped by a signal after step %d; the same command goes on from there", progress.step)
                break
        self.saver.finish()
        return progress

    def _optimizer_step(self, batches: Iterator[dict[str, Tensor]]) -> Tensor:
        """One global batch. Returns this rank's mean loss, a scalar on the device."""
        engine = self.trainee.engine
        engine.train()
        self.trainee.schedule.step(1)
        total = torch.zeros((), device=engine.device)
        for _ in range(self.micro_batches):
            loss = self._loss(next(batches))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / self.micro_batches
        return total

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of the micro-batch, nats per token."""
        device = self.trainee.engine.device
        packed = None
        if self.config.data.isolate_documents:
            packed = packed_documents(batch["tokens"], self.eod)
            batch = {key: value.flatten()[None] for key, value in batch.items()}
        tokens, labels, mask, positions = (
            batch[key].to(device, non_blocking=True) for key in ("tokens", "labels", "loss_mask", "position_ids")
        )
        losses = self.trainee.engine(tokens, positions, None, labels=labels, packed_seq_params=packed)
        return (losses.float() * mask).sum() / mask.sum()

    def _report_step(self, progress: Progress) -> None:
        train, norm = self.config.train, self.trainee.engine.get_global_grad_norm()
        interval = progress.step % train.log_interval or train.log_interval
        metrics = {
            **loss_metrics("train", progress.train_loss, self.byte_level),
            "train/lr": self.trainee.schedule.optimizer.param_groups[0]["lr"],
            "train/tokens": progress.step * train.global_batch_size * train.seq_len,
            **self.throughput.update(interval),
            "mem/peak_gib": peak_memory_gib(),
        }
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        self.observers.log(metrics, progress.step, self.throughput.eta_s(train.steps - progress.step))
        if not math.isfinite(progress.train_loss):
            self.saver.finish()
            raise UserError(
                f"train/loss ({progress.train_loss}) must be finite at step {progress.step}: the run has diverged. "
                f"Lower optim.lr ({self.config.optim.lr}) or lengthen optim.warmup_steps, and resume from a checkpoint."
            )

    def _evaluate(self, progress: Progress) -> None:
        if self.validation is None:
            return
        with self.throughput.paused():
            progress.val_loss = self._mean_loss(self.validation)
            best = progress.best_val_loss
            progress.best_val_loss = progress.val_loss if best is None else min(best, progress.val_loss)
            self.observers.log(loss_metrics("val", progress.val_loss, self.byte_level), progress.step)

    @torch.no_grad()
    def _mean_loss(self, batches: Iterable[dict[str, Tensor]]) -> float:
        engine = self.trainee.engine
        engine.eval()
        losses = [self._loss(batch) for batch in batches]
        (mean,) = mean_over_ranks(torch.stack(losses).mean())
        return mean

    def _save(self, progress: Progress) -> None:
        engine = self.trainee.engine
        with self.throughput.paused():
            self.saver.begin(
                self.trainee,
                checkpoint.Description(
                    step=progress.step,
                    **self.identity,
                    layout=checkpoint.layout(),
                    consumed_samples=progress.step * self.config.train.global_batch_size,
                    optimizer_steps=state.optimizer_steps(engine),
                    schedule=self.trainee.schedule.state_dict(),
                    loss_scale=state.loss_scale(engine),
                    wandb_run_id=self.observers.wandb_run_id,
                    val_loss=progress.val_loss,
                    best_val_loss=progress.best_val_loss,
                    config=self.resolved,
                    versions=library_versions(),
                ),
            )

    def _check_shared_parameters(self, step: int) -> None:
        differing = differing_copies(self.trainee.engine)
        if differing:
            raise RuntimeError(f"after step {step} the ranks' copies of {', '.join(differing)} are no longer equal")


def _due(step: int, interval: int, last: bool) -> bool:
    return last or (interval > 0 and step % interval == 0)
