import threading
import time

import pytest

from gqa_parallel.data.cache import build_once, cache_folder
from gqa_parallel.errors import UserError


def test_one_of_many_builds_and_all_get_it_whole(tmp_path):
    builds = []

    def build(folder):
        builds.append(folder)
        (folder / "a").write_text("1")
        time.sleep(0.05)
        (folder / "b").write_text("2")

    def ask():
        folder = build_once(tmp_path / "key", build)
        seen.append(sorted(path.name for path in folder.iterdir()))

    seen = []
    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert seen == [["a", "b"]] * 5


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "a").write_text("1")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "key", build)
    assert [path.name for path in tmp_path.iterdir()] == [".key.lock"]


def test_without_locks_the_slower_one_takes_what_is_there(tmp_path):
    def build(folder):
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "theirs").write_text("")

    assert [path.name for path in build_once(tmp_path / "key", build).iterdir()] == ["theirs"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir \(.*file/stdlib\) must be writable.*Set data.cache_dir"):
        build_once(tmp_path / "file" / "stdlib" / "key", lambda folder: None)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "gqa_parallel"
    assert cache_folder(str(tmp_path / "x")) == tmp_path / "x"
