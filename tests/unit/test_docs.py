"""README.md and docs/*.md say what is true: links, paths, commands, keys, layers of code and samples."""

import ast
import dataclasses
import enum
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from gqa_parallel.conf import schema

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `conf/...` and the like in the text: a path of the repository
PATH = re.compile(r"(?<![\w/.=-])(?:gqa_parallel|conf|launch|tests|docs)/[\w./-]*\w")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"gqa-(?:plan|train)\b|-m gqa_parallel\.launch\.(?:plan|train)\b|\b(?:single_node|multi_node)\.sh|slurm\.sbatch"
)
OVERRIDE = re.compile(r"[+~]?[a-z][\w./]*=")
# keys of gqa-plan alone, and of Hydra
NOT_IN_SCHEMA = ("world_size=", "hydra/", "hydra.")


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands() -> Iterator[str]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if PROGRAM.search(line):
                    yield line.strip()
        for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
            if PROGRAM.search(code) and OVERRIDE.search(code):
                yield code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    for path in PATH.findall(LINK.sub("]", page.read_text())):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page):
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in sources, name


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_compose(command):
    words = shlex.split(command, comments=True)
    start = next(index for index, word in enumerate(words) if PROGRAM.search(f"{' '.join(words[:index])} {word}"))
    overrides = [word.replace("$lr", "1e-3") for word in words[start + 1 :] if OVERRIDE.match(word)]
    if "-m" in words[start + 1 :]:  # a sweep: its first job
        overrides = [word.split(",")[0] for word in overrides]
    schema.register()
    with initialize_config_module("gqa_parallel.conf", version_base="1.3"):
        config = compose("config", [word for word in overrides if not word.startswith(NOT_IN_SCHEMA)])
    assert isinstance(OmegaConf.to_object(config), schema.Config)


def default_of(key: str) -> str:
    """As the table of ``running.md`` writes it."""
    node, *names = schema.Config, *key.split(".")
    for name in names:
        field = {field.name: field for field in dataclasses.fields(node)}[name]
        node = field.type
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(value, enum.Enum):
        return value.value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace("???", "required")


def test_keys_and_their_defaults():
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \| [^|]+ \|$", (ROOT / "docs/running.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    assert dict(rows) == {key: default_of(key) for key, _ in rows}


def test_presets_and_options():
    text = (ROOT / "docs/running.md").read_text()
    for option in (ROOT / "conf").glob("*/*.yaml"):
        assert f"`{option.stem}`" in text, option


def imports_of(package: Path) -> set[str]:
    """The other packages of ours that a package, or a module, imports."""
    files = package.rglob("*.py") if package.is_dir() else [package]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gqa_parallel"):
                found |= {node.module.split(".")[1]} if "." in node.module else {name.name for name in node.names}
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("gqa_parallel.")}
    return found - {package.stem}


def test_layers_of_code():
    """The table of ``architecture.md`` is what the packages import."""
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.partition("## Layers of code")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", table, re.MULTILINE)
    stated = {package: set(re.findall(r"`(\w+)`", imports)) for package, imports in rows}
    places = {
        name: next(p for p in (ROOT / "gqa_parallel" / name, ROOT / name) if p.is_dir())
        for name in stated
        if name != "errors"
    }
    places["errors"] = ROOT / "gqa_parallel/errors.py"
    assert stated == {name: imports_of(place) for name, place in places.items()}
    packaged = re.findall(r"^    gqa_parallel\.(\w+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert {*packaged, "errors"} == set(stated)


def samples() -> dict[str, str]:
    found = {}
    for page in (ROOT / "docs").glob("*.md"):
        for number, code in enumerate(blocks(page, "python")):
            found[f"{page.stem}-{number}"] = code
    return found


@pytest.mark.parametrize("name", [name for name, code in samples().items() if name.startswith("partition")])
def test_partition_samples_print_what_they_say(name):
    code = samples()[name]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"# ([\[r].*)$", code, re.MULTILINE)
    assert said and done.stdout.splitlines() == said


def test_the_sample_of_own_megatron_code_runs(tmp_path):
    text = (ROOT / "docs/running.md").read_text()
    section = text.partition("## In your own Megatron code")[2]
    (code,) = (body for language, body in BLOCK.findall(section) if language == "python")
    (tmp_path / "sample.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "sample.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (said,) = (body for language, body in BLOCK.findall(section) if language == "text")
    numbers = re.compile(r"\d+\.\d+")
    printed = [float(number) for number in numbers.findall(done.stdout)]
    # rounding to four digits in print; other processors add in another order
    assert printed == pytest.approx([float(number) for number in numbers.findall(said)], abs=2e-4)
