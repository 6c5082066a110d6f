"""Micro-batches as tensors."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gqa_parallel.data.sampler import GlobalBatchSampler

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def build_loader(
    dataset: Dataset, sampler: GlobalBatchSampler, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Read the sampler's micro-batches.

    Args:
        dataset: of ``build_datasets``.
        sampler: of this rank. Each ``iter()`` of the loader starts at its ``consumed_samples``.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: page-locked host memory, for asynchronous copies to a GPU.
    Returns:
        A loader of dicts: tokens, labels and position_ids [B, S] int64, loss_mask [B, S] float32.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # iter() draws a seed: not from the global generator, or dropout would depend on when one evaluates
        generator=torch.Generator(),
    )


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of S tokens to [B, S]."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
