"""The default corpus: the source of the Python standard library, real text that every machine has."""

import hashlib
import json
import os
import sysconfig
from pathlib import Path

from gqa_parallel.data.cache import build_once, cache_folder
from gqa_parallel.data.prepare import prepare
from gqa_parallel.data.tokenizer import load_tokenizer

# other people's code, two thirds of the library, and tables of numbers
EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


def stdlib_corpus(tokenizer: str = "byte", cache_dir: str | None = None) -> str:
    """Prepare the corpus, once per Python and tokenizer; any number of processes may ask at the same time.

    Args:
        tokenizer: see ``load_tokenizer``.
        cache_dir: None: ``~/.cache/gqa_parallel``.
    Returns:
        The prefix of the indexed dataset.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _source_files(root)
    listing = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
    identity = json.dumps([sysconfig.get_python_version(), load_tokenizer(tokenizer).fingerprint, listing])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]

    folder = build_once(
        cache_folder(cache_dir) / "stdlib" / key,
        lambda private: prepare(files, private / "corpus", tokenizer, suffixes=[".py"], workers=1, progress=False),
    )
    return str(folder / "corpus")


def _source_files(root: Path) -> list[Path]:
    """In the order of a hash: splits are cut from this order, and the alphabet's end is no fair sample."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - EXCLUDED
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
