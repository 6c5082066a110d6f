"""The file format: any block of a full tensor comes back, and nothing comes back that was not written."""

import json
import pickle
import resource
import shutil

import pytest
import torch

from gqa_parallel.checkpoint.native import (
    MANIFEST,
    DamagedCheckpoint,
    NativeCheckpoint,
    Part,
    write_file,
    write_manifest,
)

FULL = torch.arange(5 * 7 * 3).reshape(5, 7, 3).float()
BIAS = torch.arange(11, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    """``full`` cut along its second dimension into three parts, over two files."""
    name = "full"
    parts = [Part(name, FULL.shape, 1, start, FULL[:, start:stop]) for start, stop in [(0, 2), (2, 3), (3, 7)]]
    files = [
        write_file(tmp_path / "a.safetensors", [parts[0], parts[2]]),
        write_file(tmp_path / "b.safetensors", [parts[1], Part("bias", BIAS.shape, 0, 0, BIAS)]),
    ]
    write_manifest(tmp_path, {"step": 13}, files)
    return tmp_path


def rewrite(folder, change) -> None:
    """Change the manifest and sign it again, as only a program of ours would."""
    from gqa_parallel.checkpoint import native

    content = json.loads((folder / MANIFEST).read_text())
    content.pop("sha256")
    change(content)
    content["sha256"] = native._digest(content)
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "block",
    [
        (range(5), range(7), range(3)),
        (range(1, 4), range(1, 5), range(2, 3)),
        (range(5), range(2, 3), range(3)),
        (range(2, 2), range(7), range(3)),
        (range(5), range(4, 4), range(3)),
    ],
    ids=str,
)
def test_blocks(folder, block):
    checkpoint = NativeCheckpoint(folder)
    checkpoint.verify(checkpoint.files)
    expected = FULL[tuple(slice(indices.start, indices.stop) for indices in block)]
    assert torch.equal(checkpoint.read("full", block, FULL.shape, torch.float32), expected)


def test_whole_and_description(folder):
    checkpoint = NativeCheckpoint(folder)
    assert torch.equal(checkpoint.read_whole("bias"), BIAS)
    assert checkpoint.description == {"step": 13}
    assert checkpoint.files == ["a.safetensors", "b.safetensors"]


def test_files_have_the_usual_permissions(folder):
    (folder / "usual").touch()
    assert (folder / "a.safetensors").stat().st_mode == (folder / "usual").stat().st_mode


def test_every_bit_counts(folder):
    """One flipped bit anywhere in a file."""
    for name in ("a.safetensors", "b.safetensors"):
        path = folder / name
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpoint, match=rf"must be whole: {name} is not as it was written"):
                NativeCheckpoint(folder).verify([name])
        path.write_bytes(content)


def test_every_bit_of_the_manifest_counts(folder):
    """One flipped bit: refused, or the values are the same, as where a space became another one."""
    path = folder / MANIFEST
    content = path.read_bytes()
    values = json.loads(content)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            NativeCheckpoint(folder)
        except DamagedCheckpoint:
            continue
        assert json.loads(changed) == values


def test_files_that_are_not_as_written(folder):
    path = folder / "a.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DamagedCheckpoint, match=rf"a.safetensors has 100 of {size} bytes"):
        NativeCheckpoint(folder).verify(["a.safetensors"])
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors is missing"):
        NativeCheckpoint(folder).verify(["a.safetensors"])
    shutil.copy(folder / "b.safetensors", path)
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors has"):
        NativeCheckpoint(folder).verify(["a.safetensors"])


class Payload:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_no_pickle_runs(folder, tmp_path):
    """Not even where nobody verifies first."""
    (folder / "a.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors cannot be read"):
        NativeCheckpoint(folder).read_whole("full")
    (folder / MANIFEST).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(DamagedCheckpoint, match=f"{MANIFEST} cannot be read"):
        NativeCheckpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"step": 3}', '{"format": "gqa_parallel", "version": 0}'])
def test_other_manifests(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=rf"the checkpoint {folder} must be whole: {MANIFEST} "):
        NativeCheckpoint(folder)


def test_other_version(folder):
    rewrite(folder, lambda content: content.update(version=0))
    with pytest.raises(DamagedCheckpoint, match="is of format gqa_parallel 0, not gqa_parallel 1"):
        NativeCheckpoint(folder)


def test_other_shape_dtype_or_name(folder):
    checkpoint = NativeCheckpoint(folder)
    block = [range(5), range(7), range(3)]
    with pytest.raises(DamagedCheckpoint, match=r"the shape of full is \[5, 7, 3\], not \[5, 7, 2\]"):
        checkpoint.read("full", block, (5, 7, 2), torch.float32)
    with pytest.raises(DamagedCheckpoint, match="the dtype of full is float32, not bfloat16"):
        checkpoint.read("full", block, FULL.shape, torch.bfloat16)
    with pytest.raises(DamagedCheckpoint, match="it has no tensor missing"):
        checkpoint.read("missing", block, FULL.shape, torch.float32)


def test_a_manifest_that_names_another_tensor_than_the_file(folder):
    rewrite(folder, lambda content: content["tensors"]["bias"].update(dtype="float64"))
    with pytest.raises(DamagedCheckpoint, match=f"b.safetensors holds another bias than {MANIFEST} says"):
        NativeCheckpoint(folder).read_whole("bias")


def test_files_outside_the_folder_are_not_read(folder, tmp_path):
    secret = tmp_path.parent / "secret"
    secret.write_bytes((folder / "a.safetensors").read_bytes())

    def point_outside(content):
        content["files"]["../secret"] = content["files"].pop("a.safetensors")

    rewrite(folder, point_outside)
    with pytest.raises(DamagedCheckpoint, match=r"\.\./secret is missing"):
        NativeCheckpoint(folder).verify(["../secret"])


@pytest.mark.parametrize("starts", [[0, 3], [0, 1, 2], [0]], ids=str)
def test_parts_must_cover_a_tensor_once(tmp_path, starts):
    parts = [Part("w", (4, 2), 0, start, torch.zeros(2, 2)) for start in starts]
    file = write_file(tmp_path / "a.safetensors", parts)
    with pytest.raises(ValueError, match="the parts of w"):
        write_manifest(tmp_path, {}, [file])


def test_what_the_disk_refuses_is_an_os_error(tmp_path):
    """A limit on the size of files; safetensors reports it as an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(tmp_path / "a", [Part("w", (20_000,), 0, 0, torch.zeros(20_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
