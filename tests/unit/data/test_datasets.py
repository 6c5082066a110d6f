import json

import numpy as np
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from gqa_parallel.data.datasets import build_datasets
from gqa_parallel.data.loader import build_loader
from gqa_parallel.data.sampler import GlobalBatchSampler
from gqa_parallel.data.tokenizer import ByteTokenizer
from gqa_parallel.errors import UserError
from tests.unit.data.test_index import write

LENGTHS = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)


@pytest.fixture
def prefix(tmp_path):
    """Document d holds the tokens 20 * d, 20 * d + 1, ... and the end."""
    return write(tmp_path / "x", [[*range(20 * d % 200, 20 * d % 200 + n), 256] for d, n in enumerate(LENGTHS)])


@pytest.fixture
def build(prefix, tmp_path):
    def build(*paths, **changes):
        arguments = {
            "seq_len": 7,
            "train_samples": 5,
            "valid_samples": 3,
            "seed": 11,
            "split": "70,30",
            "cache_dir": str(tmp_path / "cache"),
        }
        return build_datasets(paths or [prefix], ByteTokenizer(), **arguments | changes)

    return build


def sequences(dataset) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


def test_a_sample(build):
    sample = build().train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert {key: (value.dtype, value.shape) for key, value in sample.items()} == {
        "tokens": (torch.int64, (7,)),
        "labels": (torch.int64, (7,)),
        "loss_mask": (torch.float32, (7,)),
        "position_ids": (torch.int64, (7,)),
    }
    assert sample["tokens"][1:].equal(sample["labels"][:-1])
    assert sample["loss_mask"].equal(torch.ones(7))
    assert sample["position_ids"].equal(torch.arange(7))


def test_splits_are_documents_in_order(build):
    datasets = build()
    train, validation = (np.concatenate(sequences(part)) for part in (datasets.train, datasets.validation))
    assert datasets.test is None
    assert max(token for token in train if token < 256) < 140 <= min(validation)
    assert len(datasets.train) == (sum(LENGTHS[:7]) + 7 - 1) // 7  # one epoch
    assert len(datasets.validation) == (sum(LENGTHS[7:]) + 3 - 1) // 7


def test_a_corpus_is_repeated_when_more_is_asked_for(build):
    assert len(build(train_samples=101).train) >= 101


def test_the_seed_shuffles(build):
    first, again, other = (sequences(build(seed=seed).train) for seed in (11, 11, 13))
    assert first == again
    assert first != other


def test_the_index_is_built_once(build, tmp_path):
    fresh = build()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 6
    cached = build()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == files
    assert sequences(cached.train) == sequences(fresh.train)
    assert cached.fingerprint == fresh.fingerprint


def test_a_dataset_that_was_prepared_again_gets_a_new_index(build, prefix):
    old = build()
    write(prefix, [[5] * 31] * 10)
    new = build()
    assert new.fingerprint != old.fingerprint
    assert set(np.concatenate(sequences(new.train))) == {5}


@pytest.fixture
def rank_1_of_2():
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_any_rank_can_build(build, prefix, rank_1_of_2):
    """A node whose cache nobody else sees: Megatron-Core alone waits for rank 0 to write it."""
    assert len(build().train) == len(build(cache_dir=f"{prefix}.other").train)
    assert len(build(prefix, prefix, weights=[2, 3]).train) >= 5
    assert torch.distributed.is_initialized() and torch.distributed.get_rank() == 1


def test_blends_follow_the_weights(build, tmp_path):
    a = write(tmp_path / "a", [[2] * 53] * 10)
    b = write(tmp_path / "b", [[3] * 53] * 10)
    train = build(a, b, weights=[3, 1], train_samples=400).train
    share = np.mean([train[i]["tokens"][0] == 2 for i in range(400)])
    assert share == pytest.approx(0.75, abs=1 / 400)  # Megatron-Core picks the one that lags most


def test_blends_go_by_size_unless_told_and_are_repeated(build, tmp_path):
    a = write(tmp_path / "a", [[2] * 17] * 10)
    b = write(tmp_path / "b", [[3] * 51] * 10)
    train = build(a, b, train_samples=400).train
    assert len(train) >= 400
    share = np.mean([train[i]["tokens"][0] == 3 for i in range(400)])
    assert share == pytest.approx(0.75, abs=1 / 400)


def test_a_lopsided_blend_of_small_datasets(build, tmp_path):
    """Rounding asks the first one for more than the builder's own surplus."""
    paths = [write(tmp_path / f"{i}", [[i] * 5] * 10) for i in range(11)]
    assert len(build(*paths, weights=[0.95] + [0.005] * 10, train_samples=53).train) >= 53


def test_micro_batches(build):
    datasets = build(train_samples=24)
    loaders = [build_loader(datasets.train, GlobalBatchSampler(24, 12, 2, rank, 3)) for rank in range(3)]
    batch = list(loaders[1])[1]
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "tokens": (torch.int64, (2, 7)),
        "labels": (torch.int64, (2, 7)),
        "loss_mask": (torch.float32, (2, 7)),
        "position_ids": (torch.int64, (2, 7)),
    }
    assert batch["tokens"].tolist() == sequences(datasets.train)[8:10]


def test_loading_leaves_the_global_generator_alone(build):
    loader = build_loader(build().train, GlobalBatchSampler(5, 5, 5, 0, 1))
    state = torch.get_rng_state()
    list(loader)
    assert torch.get_rng_state().equal(state)


def test_loader_processes_read_the_same(build):
    dataset = build().train
    batches = [
        [batch["tokens"] for batch in build_loader(dataset, GlobalBatchSampler(6, 2, 1, 1, 2), workers)]
        for workers in (0, 1)
    ]
    assert len(batches[0]) == 3
    assert torch.stack(batches[0]).equal(torch.stack(batches[1]))


WITHOUT = "\"data.split='100,0,0'\" train.eval_batches=0 to train without it."


@pytest.mark.parametrize(
    ("split", "seq_len", "name", "tokens", "count", "way_out"),
    [
        (
            "70,30",
            82,
            "training",
            82,
            7,
            "train.seq_len=81 or less, more text, or a larger share in data.split.",
        ),
        ("90,10", 97, "validation", 32, 1, f"train.seq_len=31 or less, more documents, or {WITHOUT}"),
        ("90,9,1", 7, "test", 0, 0, f"more documents, or {WITHOUT}"),
    ],
)
def test_a_split_shorter_than_a_sample(build, prefix, split, seq_len, name, tokens, count, way_out):
    with pytest.raises(UserError) as error:
        build(split=split, seq_len=seq_len)
    assert str(error.value) == (
        f"train.seq_len ({seq_len}) must be < tokens of the {name} split of {prefix} ({tokens}): a sample is "
        f"seq_len + 1 tokens, and this split has {count} of 10 documents. Use {way_out}"
    )


def test_the_longest_sequence_that_fits(build):
    datasets = build(seq_len=81, train_samples=1, split="70,0,30")
    assert len(datasets.train) == 1
    assert datasets.validation is None
    assert len(datasets.test) >= 3


@pytest.mark.parametrize("split", ["", "0,100", "95;5", "90,5,4,1", "-90,10", "nan", "1e3,2", "a,b"])
def test_a_split_that_is_none(build, split):
    with pytest.raises(UserError, match=r"data.split \(.*\) must be up to three numbers, the first > 0"):
        build(split=split)


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [0.0], [-1.0]])
def test_weights_that_do_not_fit(build, weights):
    with pytest.raises(UserError, match=r"data.weights \(.*\) must be one positive number per entry of data.paths"):
        build(weights=weights)


def test_no_paths(tmp_path):
    with pytest.raises(UserError, match=r"data.paths \(\[\]\) must name a dataset"):
        build_datasets([], ByteTokenizer(), seq_len=7, train_samples=5, valid_samples=3, seed=11)


def test_files_are_checked_first(build, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"tokenizer": "words", "tokenizer_fingerprint": "abc"}))
    with pytest.raises(UserError, match=r"data.tokenizer \(byte\) must be the tokenizer of"):
        build()
    with pytest.raises(UserError, match=r"must name a pair"):
        build(str(tmp_path / "nowhere"))
