"""The wheel and the sdist carry the configuration and the programs."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def build(kind: str, folder: Path) -> Path:
    """Run one hook of the build backend on a copy of the checkout."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info"))
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    target = folder / "site"
    shutil.unpack_archive(build("wheel", folder), target, format="zip")
    return target


def test_the_wheel_runs_a_program_from_anywhere(installed_wheel, tmp_path):
    command = [sys.executable, "-c", "from gqa_parallel.launch.plan import main; main()", "model=llama2_7b"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed_wheel)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616" in done.stdout  # Llama 2 7B's published number of parameters
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_holds_every_configuration_file(installed_wheel):
    def names(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*.yaml")}

    assert names(installed_wheel / "gqa_parallel/conf") == names(ROOT / "conf")


def test_the_sdist_holds_conf_and_launch(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    for folder in ("conf", "launch", "gqa_parallel"):
        sources = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        assert sources <= names
    assert Path("LICENSE") in names
