import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_parallel.data.tokenizer import ByteTokenizer, load_tokenizer
from gqa_parallel.errors import UserError


def word_tokenizer(*special: str):
    """A Hugging Face tokenizer of seven words, with two tokens that it would add around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[UNK]", "[BOS]", *special, "one", "two", "three", "five", "seven", "eleven", "thirteen"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[BOS]", *special])
    tokenizer.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """What ``save_pretrained`` leaves, with an end token of an unusual name."""
    folder = tmp_path / "words"
    folder.mkdir()
    word_tokenizer("[FIN]").save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[FIN]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text.encode(errors="replace").decode()
    assert len(ids) == 0 or ids.max() < tokenizer.eod < tokenizer.vocab_size


def test_byte_text_ends_before_the_end_token_and_may_stop_within_a_character():
    assert ByteTokenizer().detokenize([104, 105, 256, 0xC3]) == "hi\ufffd"


@pytest.mark.parametrize("part", ["", "tokenizer.json"])
def test_a_local_hugging_face_tokenizer(folder, part):
    tokenizer = load_tokenizer(str(folder / part))
    ids = tokenizer.tokenize("two seven five")
    assert ids.tolist() == [4, 7, 6]  # without [BOS]
    assert np.issubdtype(ids.dtype, np.integer)
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == "two seven five"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.is_byte_level) == (10, 2, False)


def test_the_fingerprint_is_that_of_the_content(folder, tmp_path):
    (tmp_path / "copy.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "copy").mkdir()
    word_tokenizer("<eos>").save(str(tmp_path / "copy" / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[FIN]"}}')
    original = load_tokenizer(str(folder / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "copy.json")).fingerprint == original.fingerprint
    other = load_tokenizer(str(tmp_path / "copy" / "tokenizer.json"))
    assert other.fingerprint != original.fingerprint
    assert other.unique_identifiers == {"tokenizer": other.fingerprint}


def test_bytes_travel_to_loader_processes():
    assert pickle.loads(pickle.dumps(ByteTokenizer())).unique_identifiers == {"tokenizer": "byte"}


def test_nothing_is_downloaded():
    with pytest.raises(
        UserError,
        match=r"tokenizer \(gpt2\) must be byte, a folder or a tokenizer.json.*"
        r"nothing is downloaded.*hf download gpt2",
    ):
        load_tokenizer("gpt2")


@pytest.mark.parametrize(("package", "part"), [("transformers", ""), ("tokenizers", "tokenizer.json")])
def test_a_missing_package_is_named(folder, monkeypatch, package, part):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"without the package {package}\. .*pip install gqa_parallel\[hf\]"):
        load_tokenizer(str(folder / part))


def test_a_tokenizer_without_end_of_document_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    word_tokenizer().save(str(path))
    with pytest.raises(UserError, match=r"must have an end-of-document token.*Set eos_token.*<\|endoftext\|>"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["tokenizer.json", "."])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"must be a tokenizer of Hugging Face: it cannot be read \("):
        load_tokenizer(str(tmp_path / name))
