"""Runs that save, and runs that go on from there, as gqa-train does it; run inside the ranks."""

import hashlib
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gqa_parallel.checkpoint import state
from gqa_parallel.training import checkpoint
from gqa_parallel.training.build import Trainee, build_trainee
from gqa_parallel.training.distributed import seed_everything
from gqa_parallel.training.saver import Saver
from tests.distributed.whole_models import configured

VOCAB, SEQUENCE, GLOBAL_BATCH = 257, 16, 2
SETTINGS = (
    "model.hidden_size=45",  # ZeRO cuts an odd number of rows in the middle of one
    "model.head_dim=6",
    f"train.seq_len={SEQUENCE}",
    f"train.global_batch_size={GLOBAL_BATCH}",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "optim.decay_steps=40",
)


class Run:
    """A model under training in the ranks' layout.

    Args:
        overrides: of the configuration, ``zero.stage`` and ``train.precision`` among them.
    """

    def __init__(self, overrides: list[str]) -> None:
        self.config = configured(*SETTINGS, *overrides)
        seed_everything(self.config.train.seed)
        self.trainee: Trainee = build_trainee(self.config, VOCAB)
        self.step = 0

    def train(self, steps: int) -> list[float]:
        """Losses, means over the global batch."""
        engine, dp_group = self.trainee.engine, parallel_state.get_data_parallel_group()
        positions = torch.arange(SEQUENCE)[None]
        losses = []
        for _ in range(steps):
            engine.train()
            self.trainee.schedule.step(1)
            mine = _tokens(self.step).chunk(dp_group.size())[dp_group.rank()].split(1)
            total = torch.zeros(())
            for tokens in mine:
                loss = engine(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean()
                engine.backward(loss)
                engine.step()
                total += loss.detach().float() / len(mine)
            dist.all_reduce(total, group=dp_group)
            losses.append(total.item() / dp_group.size())
            self.step += 1
        return losses

    def description(self) -> checkpoint.Description:
        return checkpoint.Description(
            step=self.step,
            model={"vocab_size": VOCAB},
            data={"seed": 0},
            layout=checkpoint.layout(),
            consumed_samples=self.step * GLOBAL_BATCH,
            optimizer_steps=state.optimizer_steps(self.trainee.engine),
            schedule=self.trainee.schedule.state_dict(),
            loss_scale=state.loss_scale(self.trainee.engine),
            wandb_run_id=None,
            val_loss=None,
            best_val_loss=None,
            config={},
            versions={},
        )

    def load(self, run_dir: Path, resume: str = "auto") -> None:
        found = checkpoint.find(resume, run_dir, {"model": {"vocab_size": VOCAB}, "data": {"seed": 0}})
        checkpoint.load(found, self.trainee, self.config.train.seed)
        self.step = found.description.step

    def digest(self) -> dict[str, str]:
        """Of each part that this rank would save, and of the weights that it computes with."""
        found = {
            f"{part.name}[{part.start}]": _hash(part.data)
            for part in [*state.take_parts(self.trainee.engine), *checkpoint.random_states()]
        }
        with deepspeed.zero.GatheredParameters(
            list(self.trainee.engine.module.parameters()), enabled=self.config.zero.stage == 3
        ):
            found |= {name: _hash(data) for name, data in self.trainee.engine.module.named_parameters()}
        return found


def save_and_train_on(run_dir: Path, overrides: list[str], before: int, after: int) -> dict:
    """``before`` steps, a checkpoint that is written while ``after`` more are done."""
    run = Run(overrides)
    losses = run.train(before)
    saver = Saver(run_dir, run.config.checkpoint)
    saver.begin(run.trainee, run.description())
    losses += run.train(after)
    saver.finish()
    return _ended(run, losses)


def resume_and_train_on(run_dir: Path, overrides: list[str], after: int, resume: str = "auto") -> dict:
    run = Run(overrides)
    run.load(run_dir, resume)
    return _ended(run, run.train(after))


def rounded_masters(run_dir: Path, overrides: list[str]) -> bool:
    """Whether, after loading and before any step, the weights are the checkpoint's fp32 values, rounded."""
    run = Run(overrides)
    run.load(run_dir)
    engine = run.trainee.engine
    weights = {}
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=run.config.zero.stage == 3):
        weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    masters = {part.name.removeprefix("weight/"): part.data for part in state.take_parts(engine)}
    equal = [
        torch.equal(weights[name], masters[name].to(weights[name].dtype))
        for name in weights
        if name in masters and weights[name].shape == masters[name].shape
    ]
    engine.destroy()
    return bool(equal) and all(equal)


def _ended(run: Run, losses: list[float]) -> dict:
    digest = run.digest()
    run.trainee.engine.destroy()
    return {"losses": losses, "digest": digest}


def _tokens(step: int) -> torch.Tensor:
    """The global batch of a step: a noisy count, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (GLOBAL_BATCH, 1), generator=generator)
    noise = torch.randint(3, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    return (start + torch.arange(SEQUENCE + 1) * 2 + noise) % VOCAB


def _hash(data: torch.Tensor) -> str:
    return hashlib.sha256(data.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
