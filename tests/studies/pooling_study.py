"""Does the mean keep what an MHA model has learned? A small version of figure 4 of arXiv:2305.13245.

python -m tests.studies.pooling_study

An MHA model is trained on the source of the Python standard library and converted to fewer KV heads by each pooling.
Printed is the validation loss (nats per byte) of each right after the conversion and after uptraining for 5 % of the
steps, beside the MHA model and models trained from scratch with as few KV heads. transformers computes the losses.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gqa_parallel.checkpoint.kv_pooling import POOLINGS
from gqa_parallel.data.datasets import build_datasets
from gqa_parallel.data.stdlib_corpus import stdlib_corpus
from gqa_parallel.data.tokenizer import load_tokenizer
from gqa_parallel.training.conversion import convert

NUM_HEADS, SEQUENCE, BATCH, VALIDATION = 4, 128, 16, 128
SHARE = 0.05
PRETRAINING = ("optim.lr=4e-3", "optim.min_lr=4e-4")
UPTRAINING = ("optim.lr=1e-3", "optim.min_lr=1e-4", "optim.warmup_steps=1", "train.seed=2")  # samples not yet seen


class Study:
    """
    Args:
        folder: for all that it writes.
        steps: of pretraining.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        datasets = build_datasets(
            [stdlib_corpus("byte")],
            load_tokenizer("byte"),
            seq_len=SEQUENCE,
            train_samples=steps * BATCH,
            valid_samples=VALIDATION,
            seed=1234,
        )
        samples = [datasets.validation[number] for number in range(VALIDATION)]
        self.tokens, self.labels = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("tokens", "labels")
        )

    def trained(self, name: str, num_kv_heads: int, steps: int, *overrides: str) -> Path:
        """A model folder of Hugging Face with the result of a run."""
        run_dir, target = self.folder / f"{name}-run", self.folder / name
        settings = [
            "model=tiny",
            f"model.num_kv_heads={num_kv_heads}",
            f"train.steps={steps}",
            f"train.seq_len={SEQUENCE}",
            f"train.micro_batch_size={BATCH}",
            f"train.global_batch_size={BATCH}",
            "train.eval_batches=0",
            "checkpoint.interval=0",
            "wandb.mode=disabled",
            f"run_dir={run_dir}",
        ]
        command = [sys.executable, "-m", "gqa_parallel.launch.train", *settings, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        convert(str(run_dir), str(target))
        return target

    @torch.no_grad()
    def loss(self, folder: Path) -> float:
        """Validation loss, nats per byte."""
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses = [
            F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
            for tokens, labels in zip(self.tokens.split(BATCH), self.labels.split(BATCH), strict=True)
        ]
        return torch.stack(losses).mean().item()

    def run(self) -> Table:
        uptraining_steps = round(self.steps * SHARE)
        table = Table(title=f"validation loss, nats per byte; {self.steps} steps, uptraining {uptraining_steps}")
        for column in ("KV heads", "made by", "converted", "uptrained"):
            table.add_column(column, justify="right")

        def uptrained(source: Path, num_kv_heads: int) -> str:
            name = f"{source.name}-uptrained"
            result = self.trained(name, num_kv_heads, uptraining_steps, f"init_from={source}", *UPTRAINING)
            return f"{self.loss(result):.3f}"

        mha = self.trained("mha", NUM_HEADS, self.steps, *PRETRAINING)
        table.add_row(str(NUM_HEADS), "training (MHA)", f"{self.loss(mha):.3f}", uptrained(mha, NUM_HEADS))
        for num_kv_heads in (2, 1):
            table.add_section()
            for pooling in POOLINGS:
                target = self.folder / f"{pooling}-{num_kv_heads}"
                convert(str(mha), str(target), num_kv_heads=num_kv_heads, pooling=pooling)
                row = f"{self.loss(target):.3f}", uptrained(target, num_kv_heads)
                table.add_row(str(num_kv_heads), pooling, *row)
            scratch = self.trained(f"scratch-{num_kv_heads}", num_kv_heads, self.steps, *PRETRAINING)
            table.add_row(str(num_kv_heads), "training (scratch)", f"{self.loss(scratch):.3f}", "")
        return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of pretraining")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        Console(width=100).print(Study(Path(folder), steps).run())


if __name__ == "__main__":
    main()
