"""Shuffled, memory-mapped training samples from indexed datasets, by Megatron-Core's own builder."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron.core
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from gqa_parallel.data.blend import check_weights, split_shares
from gqa_parallel.data.cache import build_once, cache_folder
from gqa_parallel.data.index import Index, check_dataset
from gqa_parallel.data.tokenizer import Tokenizer
from gqa_parallel.errors import UserError

logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Datasets:
    """Samples are dicts: tokens, labels and position_ids [S] int64, loss_mask [S] float32.

    Attributes:
        train: at least ``train_samples`` samples.
        validation: at least ``valid_samples``; None where the split gives it nothing.
        test: likewise.
        fingerprint: ranks that agree on it read the same number of tokens in the same order.
        corpus: names the datasets by the lengths of their documents, wherever they lie.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    fingerprint: str
    corpus: str


def build_datasets(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    weights: Sequence[float] | None = None,
    split: str = "95,5,0",
    cache_dir: str | None = None,
    vocab_size: int | None = None,
) -> Datasets:
    """Cut the documents of each dataset into splits, and the shuffled documents of a split into sequences.

    A dataset that holds fewer samples than asked for is repeated, shuffled anew. Every rank calls this,
    before or after the process group exists: it communicates nothing, and the first process of a machine
    leaves its index in the cache to the others.

    Args:
        paths: prefixes of indexed datasets.
        tokenizer: the one that made them.
        seq_len: S. A sample reads S + 1 tokens, across document boundaries.
        train_samples: sequences that training will read.
        valid_samples: sequences that one evaluation will read, of the validation and of the test split.
        seed: of the shuffles.
        weights: share of the samples per path; None: by tokens.
        split: documents for training, validation and test, as proportions.
        cache_dir: None: ``~/.cache/gqa_parallel``.
        vocab_size: see ``check_dataset``.
    Raises:
        UserError: see ``check_dataset``; or weights, split and seq_len do not fit the datasets.
    """
    if not paths:
        raise UserError("data.paths ([]) must name a dataset. Give data.paths=[PREFIX], or use data=stdlib.")
    check_weights(paths, weights)
    split_shares(split)
    indices = [check_dataset(path, tokenizer, vocab_size) for path in paths]
    if len(paths) == 1:
        weights = None
    else:
        weights = list(weights or (index.tokens for index in indices))
    sizes = [train_samples, valid_samples, valid_samples]
    identity = {
        "datasets": [index.fingerprint for index in indices],
        "weights": weights,
        "split": split,
        "seq_len": seq_len,
        "seed": seed,
        "sizes": sizes,
        "tokenizer": tokenizer.fingerprint,
        "megatron": megatron.core.__version__,
    }
    fingerprint = _hash(identity)
    corpus = _hash(identity["datasets"])[:16]

    def build(cache: Path) -> list[Dataset | None]:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_len,
            blend=(list(paths), weights),
            split=split,
            path_to_cache=str(cache),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        _check_lengths(paths, indices, config)
        with _as_one_process():
            return _build(sizes, config)

    # Megatron-Core's names inside the folder hold the paths
    folder = cache_folder(cache_dir) / "indices" / _hash([fingerprint, *paths])[:32]
    return Datasets(*build(build_once(folder, build)), fingerprint, corpus)


def _build(sizes: list[int], config: GPTDatasetConfig) -> list[Dataset | None]:
    """Enlarge the surplus of the blended datasets until rounding cannot ask one for more than it has."""
    while True:
        try:
            return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        except IndexError:
            config.mid_level_dataset_surplus *= 10


@contextlib.contextmanager
def _as_one_process() -> Iterator[None]:
    """Hide the process group from Megatron-Core's builder.

    With one, only global rank 0 writes the index, behind barriers, and every other rank expects to find it:
    that takes a file system which all nodes share. ``build_once`` serves each node on its own.
    """
    saved = torch.distributed.is_initialized, torch.distributed.get_rank
    torch.distributed.is_initialized = lambda: False
    torch.distributed.get_rank = lambda group=None: 0
    try:
        yield
    finally:
        torch.distributed.is_initialized, torch.distributed.get_rank = saved


def _check_lengths(paths: Sequence[str], indices: Sequence[Index], config: GPTDatasetConfig) -> None:
    """Every split of every dataset needs one whole sample; Megatron-Core loops for ever on an empty one."""
    for path, index in zip(paths, indices, strict=True):
        for name, share in zip(SPLITS, config.split_matrix, strict=True):
            if share is None:
                continue
            begin, end = (round(bound * len(index.lengths)) for bound in share)  # as the builder cuts
            tokens = int(index.lengths[begin:end].sum(dtype="int64"))
            if tokens < config.sequence_length + 1:
                raise UserError(
                    f"train.seq_len ({config.sequence_length}) must be < tokens of the {name} split of "
                    f"{path} ({tokens}): a sample is seq_len + 1 tokens, and this split has {end - begin} of "
                    f"{len(index.lengths)} documents. {_way_out(name, tokens)}"
                )


def _way_out(name: str, tokens: int) -> str:
    shorter = f"Use train.seq_len={tokens - 1} or less, " if tokens > 1 else "Use "
    if name == "training":
        return f"{shorter}more text, or a larger share in data.split."
    return f"{shorter}more documents, or \"data.split='100,0,0'\" train.eval_batches=0 to train without it."


def _hash(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
