import json
from pathlib import Path

import pytest

from gqa_parallel.data import stdlib_corpus as module
from gqa_parallel.data.stdlib_corpus import stdlib_corpus
from tests.unit.data.test_prepare import documents


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    for name in [
        "abc.py",
        "json/decoder.py",
        "test/test_abc.py",
        "site-packages/other/x.py",
        "json/notes.txt",
    ]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}")
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_only_the_library_itself(library, tmp_path):
    assert sorted(documents(stdlib_corpus("byte", str(tmp_path / "c")))) == ["# abc.py", "# json/decoder.py"]


def test_it_is_prepared_once_per_content(library, tmp_path):
    first = stdlib_corpus("byte", str(tmp_path / "c"))
    made = Path(f"{first}.bin").stat().st_mtime_ns
    assert stdlib_corpus("byte", str(tmp_path / "c")) == first
    assert Path(f"{first}.bin").stat().st_mtime_ns == made
    (library / "abc.py").write_text("# longer than before")
    assert stdlib_corpus("byte", str(tmp_path / "c")) != first


def test_the_installed_one_is_ten_megabytes_of_text(tmp_path):
    prefix = stdlib_corpus(cache_dir=str(tmp_path))
    about = json.loads(Path(f"{prefix}.json").read_text())
    assert about["tokens"] > 7_000_000
    assert about["documents"] > 300
