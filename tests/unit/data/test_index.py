import json
import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from gqa_parallel.data.index import DTYPES, check_dataset
from gqa_parallel.data.tokenizer import ByteTokenizer
from gqa_parallel.errors import UserError


def write(prefix, documents, dtype=np.uint16) -> str:
    """A dataset as Megatron-Core writes it, without a ``.json``."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def refusal(prefix, **arguments) -> str:
    with pytest.raises(UserError) as error:
        check_dataset(prefix, ByteTokenizer(), **arguments)
    return str(error.value)


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "x", [range(7), range(11), range(13)])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8])
def test_a_dataset_of_megatron(tmp_path, dtype):
    index = check_dataset(write(tmp_path / "x", [range(7), range(11)], dtype), ByteTokenizer())
    assert index.dtype == dtype
    assert index.lengths.tolist() == [7, 11]
    assert index.tokens == 18


def test_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", dtype=np.int32)
    builder.add_document(np.arange(5), [2, 3])
    builder.finalize(f"{tmp_path}/x.idx")
    assert check_dataset(f"{tmp_path}/x", ByteTokenizer()).lengths.tolist() == [2, 3]


def test_dtype_codes_are_those_of_megatron():
    assert {code: DType.dtype_from_code(code) for code in DTYPES} == DTYPES


def test_the_fingerprint_tells_lengths_and_dtype_apart(tmp_path):
    prefixes = [
        write(tmp_path / "a", [[2, 3], [5]]),
        write(tmp_path / "b", [[2, 3], [5]]),
        write(tmp_path / "c", [[2], [3, 5]]),
        write(tmp_path / "d", [[2, 3], [5]], np.int32),
    ]
    same, twin, *others = [check_dataset(prefix, ByteTokenizer()).fingerprint for prefix in prefixes]
    assert same == twin
    assert len({same, *others}) == 3


@pytest.mark.parametrize("missing", [[".bin"], [".idx"], [".bin", ".idx"]])
def test_missing_files_are_named(prefix, missing):
    for suffix in missing:
        os.remove(prefix + suffix)
    names = " and ".join(prefix + suffix for suffix in missing)
    verb = "do" if len(missing) > 1 else "does"
    assert refusal(prefix) == (
        f"data.paths ({prefix}) must name a pair {prefix}.bin and {prefix}.idx: {names} {verb} not exist. "
        f"Make them with gqa-prepare-data source=FOLDER target={prefix}, or train on data=stdlib."
    )


def test_a_file_in_place_of_the_prefix(prefix):
    assert refusal(f"{prefix}.bin").endswith(f"not exist. Give the prefix that both share: {prefix}.")


def test_a_bin_that_is_cut_short(prefix):
    os.truncate(f"{prefix}.bin", 61)
    assert f"size of {prefix}.bin (61 bytes) must be the 62 bytes that {prefix}.idx describes" in refusal(prefix)


@pytest.mark.parametrize("size", [0, 5, 33])
def test_an_idx_within_its_header(prefix, size):
    os.truncate(f"{prefix}.idx", size)
    message = refusal(prefix)
    assert message.startswith(f"{prefix}.idx must be the index of an indexed dataset: its {size} bytes are fewer")
    assert "fewer than the header's 34." in message


@pytest.mark.parametrize("size", [34, 47, 101])
def test_an_idx_that_is_cut_short(prefix, size):
    assert os.path.getsize(f"{prefix}.idx") == 34 + 3 * 12 + 4 * 8
    os.truncate(f"{prefix}.idx", size)
    assert f"its {size} bytes are fewer than the 102 that its header announces" in refusal(prefix)


@pytest.mark.parametrize("at", [34, 39, 62, 94])
def test_a_changed_idx(prefix, at):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(b"\x05")
    assert "lengths, offsets and document bounds contradict each other" in refusal(prefix)


@pytest.mark.parametrize("at", [0, 9, 17])
def test_a_file_of_another_format(prefix, at):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(b"\x06")
    assert "its header is not that of the format's version 1 with integer tokens" in refusal(prefix)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_an_empty_dataset(tmp_path, documents):
    prefix = write(tmp_path / "x", documents)
    assert f"data.paths ({prefix}) must hold at least one token" in refusal(prefix)


def test_another_tokenizer(prefix, tmp_path):
    about = {"tokenizer": "path/to/words", "tokenizer_fingerprint": "abc"}
    (tmp_path / "x.json").write_text(json.dumps(about))
    assert refusal(prefix).startswith(
        f"data.tokenizer (byte) must be the tokenizer of {prefix} (path/to/words): another one gives "
        f"its ids another meaning. Set data.tokenizer=path/to/words"
    )


@pytest.mark.parametrize("text", ["", "[]", '{"text": 1}', "not json"])
def test_a_json_of_another_kind_is_left_alone(prefix, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    check_dataset(prefix, ByteTokenizer())


def test_an_id_beyond_the_vocabulary(tmp_path):
    prefix = write(tmp_path / "x", [[2, 3, 307], [5]])
    message = f"largest token id of {prefix}.bin (307) must be < vocabulary size (257)"
    assert message in refusal(prefix)
    assert "model.vocab_size to at least 308." in refusal(prefix)
    check_dataset(prefix, ByteTokenizer(), vocab_size=308)
