"""Model folders: what is read and written, how much memory that takes, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_parallel.checkpoint.folders import HuggingFaceFolder, appearing_whole, write_folder
from gqa_parallel.checkpoint.lazy_tensor import LazyTensor, stack_rows
from gqa_parallel.errors import UserError

TENSORS = {
    "a.weight": torch.arange(35.0).view(7, 5),
    "b.bias": torch.arange(3).to(torch.bfloat16),
    "c.weight": torch.arange(22, dtype=torch.float16).view(11, 2),
    "d": torch.arange(13, dtype=torch.int64),
}
CONFIG = {"model_type": "llama"}


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.__getitem__)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write_folder(path, CONFIG, {name: lazy(tensor) for name, tensor in TENSORS.items()}, shard_bytes=147)
    return path


def test_what_is_written_is_what_the_library_reads(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(folder / index["weight_map"][name])[name], tensor)
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert len(set(index["weight_map"].values())) == 3


def test_what_is_read_back(folder):
    opened = HuggingFaceFolder(folder)
    assert opened.config == CONFIG and set(opened) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert opened[name].shape == tuple(tensor.shape) and opened[name].dtype == tensor.dtype
        assert torch.equal(opened[name][(slice(1, 3),)], tensor[1:3])
    assert torch.equal(opened["a.weight"][(slice(None), slice(2, 4))], TENSORS["a.weight"][:, 2:4])


def test_blocks_are_small_and_complete():
    tensor = TENSORS["a.weight"]
    blocks = list(lazy(tensor).blocks(max_bytes=2 * 5 * 4))
    assert [start for start, _ in blocks] == [0, 2, 4, 6]
    assert torch.equal(torch.cat([block for _, block in blocks]), tensor)


def test_rows_of_several_tensors():
    a, c = TENSORS["a.weight"], torch.randn(4, 5)
    stacked = stack_rows([(lazy(a), range(5, 7)), (lazy(c), range(4)), (lazy(a), range(2))])
    expected = torch.cat([a[5:7], c, a[:2]])
    assert stacked.shape == expected.shape
    for start in range(8):
        for stop in range(start + 1, 9):
            assert torch.equal(stacked[(slice(start, stop), slice(1, 3))], expected[start:stop, 1:3])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "model"
    with pytest.raises(RuntimeError), appearing_whole(target) as path:
        (path / "half").touch()
        assert not target.exists()
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with appearing_whole(target) as path:
        (path / "all").touch()
    assert [file.name for file in target.parent.iterdir()] == ["model"]
    assert [file.name for file in target.iterdir()] == ["all"]
    with pytest.raises(UserError, match=r"target \(.*\) must be new: it exists"), appearing_whole(target):
        pass


def test_no_space_is_said(tmp_path):
    message = r"must be writable: No space left on device"
    with pytest.raises(UserError, match=message), appearing_whole(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_only_what_belongs_to_a_model_is_carried(folder):
    for name in ("tokenizer.json", "LICENSE.txt", "USE_POLICY.md", "modeling.py", "pytorch_model.bin", "merges.txt"):
        (folder / name).touch()
    carried = [file.name for file in HuggingFaceFolder(folder).carried]
    assert carried == ["LICENSE.txt", "USE_POLICY.md", "merges.txt", "tokenizer.json"]


def no_config(folder):
    (folder / "config.json").unlink()


def config_of_text(folder):
    (folder / "config.json").write_text("{")


def config_of_a_list(folder):
    (folder / "config.json").write_text("[]")


def pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def no_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def a_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def a_truncated_shard(folder):
    with (folder / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.truncate(100)


def an_index_that_leads_elsewhere(folder):
    save_file({"x": torch.zeros(1)}, folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}')


def an_index_of_text(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def a_quantised_tensor(folder):
    for file in folder.glob("model*"):
        file.unlink()
    save_file({"x": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_config, "must be a model folder of Hugging Face or a checkpoint of ours: it holds neither config.json nor"),
        (config_of_text, "config.json must be a JSON object: "),
        (config_of_a_list, "config.json must be a JSON object: it is a list."),
        (pickles, "must hold its weights as safetensors: pytorch_model.bin can run code when it is read. Save it"),
        (no_weights, "must hold model.safetensors or model.safetensors.index.json: there are no weights."),
        (a_missing_shard, "must hold every file of model.safetensors.index.json: model-00002-of-00003.safetensors"),
        (a_truncated_shard, "model-00002-of-00003.safetensors must be a whole safetensors file"),
        (an_index_that_leads_elsewhere, "must hold every file of model.safetensors.index.json: ../elsewhere"),
        (an_index_of_text, "model.safetensors.index.json must map tensors to files"),
        (a_quantised_tensor, "the dtype of x (F8_E4M3 [2, 2]) must be one of F64, F32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_model_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError) as caught:
        HuggingFaceFolder(folder)
    assert message in str(caught.value)


COPY = """
import resource, sys
from pathlib import Path
from gqa_parallel.checkpoint.folders import HuggingFaceFolder, write_folder

def peak():
    # VmHWM is this process's own; ru_maxrss starts from its parent's
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

source, target = map(Path, sys.argv[1:])
opened = HuggingFaceFolder(source)
before = peak()
write_folder(target, opened.config, opened, shard_bytes=1 << 28)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """1 GiB in tensors of 64 MiB: what is read stays mapped up to 64 MiB, and a block of 32 MiB is there twice."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    row = torch.ones(1, 4096, dtype=torch.bfloat16)
    tensor = LazyTensor((8192, 4096), row.dtype, lambda index: row.expand(len(range(8192)[index[0]]), -1))
    write_folder(source, CONFIG, {f"t{number}": tensor for number in range(16)}, shard_bytes=1 << 29)
    done = subprocess.run([sys.executable, "-c", COPY, source, target], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in target.iterdir()) > 1 << 30
    assert int(done.stdout) < 1.3 * (64 << 20) + (128 << 20)
