import subprocess
import sys

import pytest


@pytest.fixture
def prepare_data(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "gqa_parallel.launch.prepare_data", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("hello")
    (tmp_path / "corpus" / "b.jsonl").write_text('{"text": "seven"}\n')
    return run


def test_success(prepare_data, tmp_path):
    result = prepare_data("source=corpus/", "target=data/corpus", "workers=1")
    assert result.returncode == 0, result.stderr
    summary, command = result.stdout.splitlines()
    assert summary.startswith("data/corpus: 2 documents, 12 tokens from 23 bytes in ")
    assert command == "gqa-train data.paths=[data/corpus]"
    assert result.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["source=[corpus/a.txt,nowhere]", "target=x"],
            "source (nowhere) must exist: there is no such file or folder.",
        ),
        (
            ["source=corpus", "target=x", "tokeniser=byte"],
            "unknown key tokeniser: no part of the configuration reads it.",
        ),
        (["source=corpus"], "source (corpus) and target (None) must be given"),
    ],
)
def test_mistakes(prepare_data, arguments, message, tmp_path):
    result = prepare_data(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"\nerror: {message}")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
