import json
import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from gqa_parallel.data import prepare as module
from gqa_parallel.data.prepare import Prepared, prepare
from gqa_parallel.data.tokenizer import ByteTokenizer, load_tokenizer
from gqa_parallel.errors import UserError
from tests.unit.data.test_tokenizer import word_tokenizer


def documents(prefix) -> list[str]:
    """The texts of a dataset, after looking at the end of each."""
    dataset = IndexedDataset(str(prefix))
    assert all(ids[-1] == 256 and 256 not in ids[:-1] for ids in dataset)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [ByteTokenizer().detokenize(ids) for ids in dataset]


def write_lines(path, *records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_files_lines_and_folders_come_back_in_order(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "b.txt").write_bytes(b"second\r\nline")
    (corpus / "sub" / "c.jsonl").write_bytes(b'{"text": "third"}\n\n{"id": 5, "text": "\\u00e9"}')
    (corpus / "a.txt").write_text("first")
    (corpus / "empty.txt").write_text("")
    (corpus / "ignored.md").write_text("no")
    result = prepare([corpus, corpus / "a.txt"], tmp_path / "out" / "x")
    assert documents(tmp_path / "out" / "x") == ["first", "second\r\nline", "third", "é", "first"]
    assert result == Prepared(documents=5, tokens=5 + 12 + 5 + 2 + 5 + 5, bytes=5 + 12 + 46 + 5, repaired=0)
    assert json.loads((tmp_path / "out" / "x.json").read_text()) == {
        "tokenizer": "byte",
        "tokenizer_fingerprint": "byte",
        "vocab_size": 257,
        "documents": 5,
        "tokens": 34,
    }
    assert IndexedDataset(str(tmp_path / "out" / "x")).index.dtype is np.uint16
    assert sorted(os.listdir(tmp_path / "out")) == ["x.bin", "x.idx", "x.json"]


def test_other_suffixes_are_documents(tmp_path):
    (tmp_path / "a.py").write_text("pass")
    (tmp_path / "b.txt").write_text("no")
    prepare([tmp_path], tmp_path / "x", suffixes=[".py"])
    assert documents(tmp_path / "x") == ["pass"]


@pytest.mark.parametrize("chunk", [1, 7, 31, 101])
def test_a_line_is_read_once_wherever_the_chunks_are_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    texts = ["x" * n for n in (1, 2, 3, 5, 7, 11, 13, 53)]
    write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    prepare([tmp_path / "a.jsonl"], tmp_path / "x", workers=1)
    assert documents(tmp_path / "x") == texts


def test_the_number_of_workers_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 211)
    write_lines(tmp_path / "a.jsonl", *({"text": "x" * (n * 31 % 101) + str(n)} for n in range(101)))
    for n in range(7):
        (tmp_path / f"{n}.txt").write_text("y" * 41 * n)
    results = [prepare([tmp_path], tmp_path / str(workers) / "x", workers=workers) for workers in (1, 2)]
    assert results[0] == results[1]
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / "1" / f"x{suffix}").read_bytes() == (tmp_path / "2" / f"x{suffix}").read_bytes()


def test_a_workers_mistake_reaches_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 11)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 5 + "{\n")
    with pytest.raises(UserError, match=r"a.jsonl:6\) must be one JSON object"):
        prepare([tmp_path], tmp_path / "x", workers=2)


def test_broken_unicode_is_repaired_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud800x"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\xffy"}\n')
    assert prepare([tmp_path], tmp_path / "x").repaired == 3
    assert documents(tmp_path / "x") == ["ab\ufffdcd", "\ufffdx", "😀", "\ufffdy"]


def test_a_hugging_face_tokenizer_end_to_end(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    word_tokenizer("<eos>").save(path)
    (tmp_path / "a.txt").write_text("one two unknown thirteen")
    prepare([tmp_path / "a.txt"], tmp_path / "x", tokenizer=path)
    dataset = IndexedDataset(str(tmp_path / "x"))  # its arrays must not outlive it
    assert dataset[0].tolist() == [3, 4, 0, 9, 2]
    about = json.loads((tmp_path / "x.json").read_text())
    assert about["tokenizer_fingerprint"] == load_tokenizer(path).fingerprint


def test_an_early_end_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 11)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 5 + "{\n")
    with pytest.raises(UserError):
        prepare([tmp_path / "a.jsonl"], tmp_path / "x", workers=1)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_end_between_the_renames_leaves_no_dataset(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    prepare([tmp_path / "a.txt"], tmp_path / "x")
    (tmp_path / "a.txt").write_text("newer")
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "a.txt"], tmp_path / "x", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "x.bin", "x.json"]


def test_an_existing_target_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    prepare([tmp_path / "a.txt"], tmp_path / "x")
    (tmp_path / "a.txt").write_text("new")
    with pytest.raises(UserError, match=r"target \(.*x\) must be new: .*x.idx.* or overwrite=true"):
        prepare([tmp_path / "a.txt"], tmp_path / "x")
    assert documents(tmp_path / "x") == ["old"]
    prepare([tmp_path / "a.txt"], tmp_path / "x", overwrite=True)
    assert documents(tmp_path / "x") == ["new"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"source \(.*a.jsonl:3\) must be one JSON object: Expecting value.*Repair or remove"),
        ('["text"]', r"source \(.*a.jsonl:3\) must be one JSON object: it is a list\."),
        (
            '{"id": 5, "body": "b"}',
            r"text_field \(text\) .*a.jsonl:3 it is missing; the keys there are id, body\.",
        ),
        ('{"text": 5}', r"text_field \(text\) must hold text in every line: at .*a.jsonl:3 it holds a int"),
        ("{}", r"a.jsonl:3 it is missing; the keys there are none\. Set text_field=NAME\."),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "a.jsonl"], tmp_path / "x")


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(UserError, match=r"source \(.*nowhere\) must exist: there is no such file or folder"):
        prepare([tmp_path / "nowhere"], tmp_path / "x")


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"must contain files that end in \.txt or \.jsonl: there is none"):
        prepare([tmp_path], tmp_path / "x")


def test_an_unknown_suffix_is_named(tmp_path):
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match=r"a.md\) must end in \.txt or \.jsonl.*suffixes=\[\.md\]"):
        prepare([tmp_path / "a.md"], tmp_path / "x")


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"must contain text: all 13 bytes give no document"):
        prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "x")
    with pytest.raises(UserError, match=r"source \(\[\]\) must name at least one file"):
        prepare([], tmp_path / "x")
