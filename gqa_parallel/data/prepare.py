"""Text to an indexed dataset: ``PREFIX.bin`` (tokens), ``PREFIX.idx`` (lengths), ``PREFIX.json`` (tokenizer).

One document is one sequence that ends in the end-of-document token. The work is cut into chunks of whole
documents, encoded by processes and written in order, so the result does not depend on their number.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gqa_parallel.data.tokenizer import Tokenizer, load_tokenizer
from gqa_parallel.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

SUFFIXES = (".txt", ".jsonl")
CHUNK_BYTES = 4 << 20
PARTS = (".bin", ".json", ".idx")  # in the order in which they appear: without .idx there is no dataset


@dataclass(frozen=True)
class Prepared:
    """What a prepared corpus holds.

    Attributes:
        documents: those with at least one token of text.
        tokens: with the end-of-document tokens.
        bytes: of the source files.
        repaired: documents with invalid UTF-8, whose bad bytes became U+FFFD.
    """

    documents: int
    tokens: int
    bytes: int
    repaired: int


class Piece(NamedTuple):
    """Part of a source file: a whole text, or the lines of a ``.jsonl`` that start in ``[begin, end)``."""

    path: Path
    begin: int
    end: int


class Encoded(NamedTuple):
    """The documents of a chunk, in order, and what they came from."""

    documents: list[np.ndarray]
    bytes: int
    repaired: int


def prepare(
    sources: Sequence[str | Path],
    target: str | Path,
    tokenizer: str = "byte",
    text_field: str = "text",
    suffixes: Iterable[str] = SUFFIXES,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Tokenize text files into an indexed dataset.

    Args:
        sources: files and folders, in this order; a folder gives its files, by name, and its subfolders'.
        target: the prefix of the files to write. A run that ends early leaves nothing under these names.
        tokenizer: see ``load_tokenizer``.
        text_field: the key of a ``.jsonl`` line that holds its document.
        suffixes: which files to read: ``.jsonl`` has one document per line, any other is one document.
        workers: processes; None: one per core.
        overwrite: replace an existing dataset.
        progress: show a bar while standard error is a terminal.
    Raises:
        UserError: no or unknown input, a line that cannot be read, no text at all, or the target exists.
    """
    target = Path(target)
    existing = [str(path) for path in map(partial(_part, target), PARTS) if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"target ({target}) must be new: {', '.join(existing)} would be replaced. Give another, or overwrite=true."
        )
    encoder = load_tokenizer(tokenizer)
    chunks = list(_chunks(_find_files(sources, tuple(suffixes))))
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        private = Path(folder) / "corpus"
        builder = _open_builder(private, encoder)
        encode = partial(_encode, tokenizer=tokenizer, dtype=builder.dtype, text_field=text_field)
        with _progress_bar(chunks, progress) as advance:
            prepared = _write(builder, _map_ordered(encode, chunks, workers), advance)
        if not prepared.documents:
            raise UserError(
                f"source ({', '.join(map(str, sources))}) must contain text: all {prepared.bytes} bytes give "
                f"no document. Check the files, and text_field ({text_field}) for .jsonl."
            )
        builder.finalize(str(_part(private, ".idx")))
        _describe(private, encoder, prepared)
        _publish(private, target)
    return prepared


def _find_files(sources: Sequence[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    files = []
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if path.suffix in suffixes and path.is_file())
            if not found:
                raise UserError(
                    f"source ({source}) must contain files that end in {' or '.join(suffixes)}: there is "
                    f"none. Name other endings with suffixes=[.py,.md]."
                )
            files += found
        elif not source.exists():
            raise UserError(f"source ({source}) must exist: there is no such file or folder. Check the path.")
        elif source.suffix not in suffixes:
            raise UserError(
                f"source ({source}) must end in {' or '.join(suffixes)}: others may not be text. "
                f"If it is, accept it with suffixes=[{source.suffix}]."
            )
        else:
            files.append(source)
    if not files:
        raise UserError("source ([]) must name at least one file or folder. Use source=FOLDER.")
    return files


def _chunks(files: list[Path]) -> Iterator[list[Piece]]:
    """About ``CHUNK_BYTES`` each: parts of a long ``.jsonl``, or several short files."""
    chunk, size = [], 0
    for path in files:
        length = path.stat().st_size
        step = CHUNK_BYTES if path.suffix == ".jsonl" else max(length, 1)
        for begin in range(0, length, step):
            piece = Piece(path, begin, min(begin + step, length))
            chunk.append(piece)
            size += piece.end - piece.begin
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _map_ordered(
    function: Callable[[list[Piece]], Encoded], chunks: list[list[Piece]], workers: int
) -> Iterator[Encoded]:
    """``map`` over processes, in order; at most two results per worker wait in memory."""
    if workers <= 1:
        yield from map(function, chunks)
        return
    # spawn: forking a process that has threads can hang, and importing torch starts some
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_follow_parent)
    try:
        pending = deque()
        for chunk in chunks:
            pending.append(pool.submit(function, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it, also when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # once per worker


def _encode(chunk: list[Piece], tokenizer: str, dtype: type[np.number], text_field: str) -> Encoded:
    encoder = _tokenizer(tokenizer)
    documents, repaired = [], 0
    for piece in chunk:
        for raw in _documents(piece, text_field):
            text, is_valid = _decode(raw)
            ids = encoder.tokenize(text)
            repaired += not is_valid
            if len(ids):
                document = np.empty(len(ids) + 1, dtype)
                document[:-1] = ids
                document[-1] = encoder.eod
                documents.append(document)
    return Encoded(documents, sum(piece.end - piece.begin for piece in chunk), repaired)


def _documents(piece: Piece, text_field: str) -> Iterator[bytes | str]:
    if piece.path.suffix != ".jsonl":
        yield piece.path.read_bytes()
        return

    def place() -> str:
        return f"{piece.path}:{_line_number(piece.path, begin)}"

    with open(piece.path, "rb") as file:
        if piece.begin:  # a line belongs to the piece in which it starts
            file.seek(piece.begin - 1)
            file.readline()
        while (begin := file.tell()) < piece.end:
            line = file.readline()
            if line.strip():
                yield _text_of_line(line, text_field, place)


def _text_of_line(line: bytes, text_field: str, place: Callable[[], str]) -> bytes | str:
    try:
        record = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise UserError(f"source ({place()}) must be one JSON object: {error}. Repair or remove this line.") from error
    if not isinstance(record, dict):
        raise UserError(
            f"source ({place()}) must be one JSON object: it is a {type(record).__name__}. "
            f'Write {{"{text_field}": "..."}}.'
        )
    text = record.get(text_field)
    if not isinstance(text, str):
        kind = f"holds a {type(text).__name__}" if text_field in record else "is missing"
        raise UserError(
            f"text_field ({text_field}) must hold text in every line: at {place()} it {kind}; "
            f"the keys there are {', '.join(record) or 'none'}. Set text_field=NAME."
        )
    return text


def _line_number(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(min(CHUNK_BYTES, offset - file.tell())), b"")
        return 1 + sum(block.count(b"\n") for block in blocks)


def _decode(raw: bytes | str) -> tuple[str, bool]:
    """The text, and whether it was valid Unicode; JSON can hold half of a surrogate pair."""
    if isinstance(raw, bytes):
        try:
            return raw.decode(), True
        except UnicodeDecodeError:
            return raw.decode(errors="replace"), False
    try:
        raw.encode()
        return raw, True
    except UnicodeEncodeError:
        return raw.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace"), False


def _open_builder(prefix: Path, tokenizer: Tokenizer) -> "IndexedDatasetBuilder":
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(str(_part(prefix, ".bin")), dtype=DType.optimal_dtype(tokenizer.vocab_size))


def _write(builder: "IndexedDatasetBuilder", chunks: Iterator[Encoded], advance: Callable[[int], None]) -> Prepared:
    documents = tokens = size = repaired = 0
    for chunk in chunks:
        for document in chunk.documents:
            builder.add_document(document, [len(document)])
            tokens += len(document)
        documents += len(chunk.documents)
        size += chunk.bytes
        repaired += chunk.repaired
        advance(chunk.bytes)
    return Prepared(documents, tokens, size, repaired)


def _describe(prefix: Path, tokenizer: Tokenizer, prepared: Prepared) -> None:
    about = {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "documents": prepared.documents,
        "tokens": prepared.tokens,
    }
    _part(prefix, ".json").write_text(json.dumps(about, indent=2) + "\n")


def _publish(private: Path, target: Path) -> None:
    """Give the files their names."""
    _part(target, ".idx").unlink(missing_ok=True)
    for suffix in PARTS:
        os.replace(_part(private, suffix), _part(target, suffix))


def _part(prefix: Path, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")


@contextlib.contextmanager
def _progress_bar(chunks: list[list[Piece]], wanted: bool) -> Iterator[Callable[[int], None]]:
    if not (wanted and sys.stderr.isatty()):
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(piece.end - piece.begin for chunk in chunks for piece in chunk))
        yield partial(bar.advance, task)
