"""Text to token ids and back: raw bytes, or a Hugging Face tokenizer that lies on this machine."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gqa_parallel.errors import UserError

# how well-known vocabularies spell the end of a document
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")
INSTALL_HF = "Install them: pip install gqa_parallel[hf]."


class Tokenizer(ABC):
    """What datasets, training and generation need of a tokenizer; Megatron-Core's datasets take it as it is.

    Attributes:
        name: what ``load_tokenizer`` was called with.
        vocab_size: number of token ids, unpadded; every id is below it.
        eod: the id that ends a document.
        fingerprint: equal for tokenizers that give the same ids, wherever they lie.
        is_byte_level: one token is one byte, so the loss in bits is bits per byte.
    """

    name: str
    vocab_size: int
    eod: int
    fingerprint: str
    is_byte_level: bool = False

    @abstractmethod
    def tokenize(self, text: str) -> np.ndarray:
        """The ids of ``text``, [tokens], any integer dtype, without special tokens around it."""

    @abstractmethod
    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens are left out."""

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What Megatron-Core's index cache is keyed on."""
        return {"tokenizer": self.fingerprint}


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8; id 256 ends a document."""

    name = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = "byte"
    is_byte_level = True

    def tokenize(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def detokenize(self, ids: Iterable[int]) -> str:
        # generation can stop within a character
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of Hugging Face, from a local folder or a ``tokenizer.json``; nothing is ever downloaded.

    Args:
        path: a folder that ``transformers.AutoTokenizer`` can read, or a ``tokenizer.json``.
    Raises:
        UserError: a package is missing, the files are no tokenizer, or it has no end-of-document token.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        if Path(path).is_dir():
            vocab, eod, serialised = self._load_folder(path)
        else:
            vocab, eod, serialised = self._load_json(Path(path))
        self.vocab_size = max(vocab.values()) + 1
        self.fingerprint = hashlib.sha256(serialised.encode()).hexdigest()
        if eod is None:
            raise UserError(
                f"tokenizer ({path}) must have an end-of-document token: documents are joined by it. "
                f"Set eos_token in its tokenizer_config.json, or add one of {', '.join(END_OF_DOCUMENT)}."
            )
        self.eod = eod

    def _load_folder(self, path: str) -> tuple[dict[str, int], int | None, str]:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                f"tokenizer ({path}) must be byte without the package transformers. {INSTALL_HF}"
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise many types, also the bare one
            raise _unreadable(path, error) from error
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        vocab = tokenizer.get_vocab()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        serialised = backend.to_str() if backend else json.dumps(vocab, sort_keys=True)
        return vocab, tokenizer.eos_token_id, serialised

    def _load_json(self, path: Path) -> tuple[dict[str, int], int | None, str]:
        try:
            from tokenizers import Tokenizer as RustTokenizer
        except ImportError as error:
            raise UserError(f"tokenizer ({path}) must be byte without the package tokenizers. {INSTALL_HF}") from error
        try:
            tokenizer = RustTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises the bare type
            raise _unreadable(str(path), error) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        names = [*_configured_eos(path.with_name("tokenizer_config.json")), *END_OF_DOCUMENT]
        eod = next((vocab[name] for name in names if name in vocab), None)
        return vocab, eod, tokenizer.to_str()

    def tokenize(self, text: str) -> np.ndarray:
        return np.asarray(self._encode(text), dtype=np.int32)

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._decode([int(i) for i in ids])


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Args:
        name: ``byte``, a folder with a Hugging Face tokenizer, or a ``tokenizer.json``.
    Raises:
        UserError: nothing lies there, or it is no usable tokenizer.
    """
    if name == "byte":
        return ByteTokenizer()
    if not Path(name).exists():
        raise UserError(
            f"tokenizer ({name}) must be byte, a folder or a tokenizer.json: there is no such path, and "
            f"nothing is downloaded. Use byte, or fetch it first: "
            f"hf download {name} --local-dir FOLDER."
        )
    return HuggingFaceTokenizer(name)


def _configured_eos(config: Path) -> list[str]:
    """The end token that ``tokenizer_config.json`` names, as text or as a serialised token."""
    if not config.exists():
        return []
    eos = json.loads(config.read_text()).get("eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    return [name] if name else []


def _unreadable(path: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"tokenizer ({path}) must be a tokenizer of Hugging Face: it cannot be read ({reason}). "
        f"Give a folder with a tokenizer.json, such a file, or byte."
    )
