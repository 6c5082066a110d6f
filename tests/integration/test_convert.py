"""``gqa-convert`` from folder to folder, and ``gqa-train init_from`` with what it wrote."""

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from gqa_parallel.data.datasets import build_datasets
from gqa_parallel.data.stdlib_corpus import stdlib_corpus
from gqa_parallel.data.tokenizer import load_tokenizer
from gqa_parallel.training.history import read_history
from tests.integration.programs import Finished, finished, torchrun

CONVERT = [sys.executable, "-m", "gqa_parallel.launch.convert"]
FIELDS = {
    "vocab_size": 257,  # of bytes
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
FAMILIES = {"llama": {}, "phi3": {}, "qwen2": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder for each family: MHA, in several files, bf16 for Phi-3, with a tokenizer's file."""
    folder = tmp_path_factory.mktemp("models")
    for model_type, fields in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **FIELDS, **fields))
        model.to(torch.bfloat16 if model_type == "phi3" else torch.float32)
        model.save_pretrained(folder / model_type, max_shard_size="20KB")
        (folder / model_type / "tokenizer.json").write_text('{"of": "a tokenizer"}')
    return folder


def convert(folder: Path, *arguments: str) -> Finished:
    return finished([*CONVERT, *arguments], folder / "elsewhere", timeout_s=60)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_there_and_back_changes_no_bit(models, tmp_path, model_type):
    source, native, back = models / model_type, tmp_path / "native", tmp_path / "back"
    there = convert(tmp_path, f"source={source}", f"target={native}", "format=native")
    assert there.exit_code == 0, there.stderr
    assert convert(tmp_path, f"source={native}", f"target={back}").exit_code == 0
    assert re.fullmatch(rf"{native}: {model_type}, 4 KV heads, \d+ tensors, 0.000 GB in .* s\n", there.stdout)
    before, after = state(source), state(back)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (back / "tokenizer.json").read_text() == '{"of": "a tokenizer"}'
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pooled_model_is_an_ordinary_one(models, tmp_path, model_type):
    source, target = models / model_type, tmp_path / "pooled"
    done = convert(tmp_path, f"source={source}", f"target={target}", "num_kv_heads=2", "pooling=mean")
    assert done.exit_code == 0, done.stderr
    assert f"{model_type}, 4 -> 2 KV heads" in done.stdout
    mha = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    pooled = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert (pooled.config.model_type, pooled.config.num_key_value_heads) == (model_type, 2)
    # the same function: an MHA model with every KV head replaced by its pair's mean, rounded as it was stored
    dtype = torch.bfloat16 if model_type == "phi3" else torch.float32
    expected = {name: with_means(name, tensor, dtype) for name, tensor in mha.state_dict().items()}
    mha.load_state_dict(expected)
    tokens = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pooled(tokens).logits, mha(tokens).logits, rtol=0, atol=2e-5)


def with_means(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Both heads of each pair are their mean, in K and V: the lowest rows of Phi-3's fused tensor."""
    if not re.search("k_proj|v_proj|qkv_proj", name):
        return tensor
    num_rows = 4 * 6 * (2 if "qkv" in name else 1)
    pairs = tensor[-num_rows:].unflatten(0, (-1, 2, 6))
    means = pairs.mean(1, keepdim=True).to(dtype).float().expand_as(pairs)
    return torch.cat([tensor[:-num_rows], means.flatten(0, 2)])


@pytest.fixture
def broken(models, tmp_path) -> dict[str, Path]:
    """Folders that are no models."""
    folders = {name: tmp_path / name for name in ("pickled", "unknown", "lacking")}
    folders["pickled"].mkdir()
    shutil.copy(models / "llama" / "config.json", folders["pickled"])
    (folders["pickled"] / "pytorch_model.bin").touch()
    shutil.copytree(models / "llama", folders["unknown"])
    (folders["unknown"] / "config.json").write_text('{"model_type": "mamba"}')
    shutil.copytree(models / "llama", folders["lacking"])
    index = folders["lacking"] / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    left_out = weight_map["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": {n: file for n, file in weight_map.items() if file != left_out}}))
    return folders


@pytest.mark.timeout(240)
def test_mistakes_end_with_one_message(models, broken, tmp_path):
    source, new = f"source={models / 'llama'}", f"target={tmp_path / 'new'}"
    pickled, unknown, lacking = broken.values()
    mistakes = {
        (source,): f"source ({models / 'llama'}) and target (None) must be given",
        (f"source={unknown}", new): "model_type ('mamba') must be one of gemma2, ",
        (f"source={pickled}", new): f"source ({pickled}) must hold its weights as safetensors: pytorch_model.bin can",
        (f"source={lacking}", new): "must be those of the model: they lack ",
        (source, f"target={unknown}"): f"target ({unknown}) must be new: it exists.",
        (source, new, "num_kv_heads=3"): "num_kv_heads (3) must divide the model's num_kv_heads (4): ",
    }
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / f"mistake-{number}" for number in range(len(mistakes))]
        ends = list(pool.map(lambda folder, arguments: convert(folder, *arguments), folders, mistakes))
    for (arguments, message), end in zip(mistakes.items(), ends, strict=True):
        assert end.exit_code == 2, (arguments, end.stderr)
        assert end.stderr.count(message) == 1 and end.stderr.count("error: ") == 1, (arguments, end.stderr)
        assert "Traceback" not in end.stderr and end.stdout == "", (arguments, end.stderr)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


OVERRIDES = [
    "model=debug",
    "model.hidden_size=24",
    "model.num_kv_heads=2",
    "model.head_dim=6",
    "model.ffn_hidden_size=20",
    "model.qk_norm=false",
    "model.tie_embeddings=false",
    "model.norm_eps=1e-6",
    "train.steps=1",
    "train.seq_len=32",
    "train.global_batch_size=2",
    "train.eval_batches=0",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def pooled(models, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("pooled") / "llama"
    assert convert(target.parent, f"source={models / 'llama'}", f"target={target}", "num_kv_heads=2").exit_code == 0
    return target


@pytest.mark.parametrize("tp_size", [1, 2])
def test_training_starts_from_the_weights(pooled, small, tmp_path, tp_size):
    """The first loss is that of the same tokens in transformers, and a checkpoint is exported again."""
    cache = next(override for override in small if override.startswith("data.cache_dir"))
    run_dir = tmp_path / "run"
    # a learning rate so small that it changes no fp32 weight
    overrides = [*OVERRIDES, cache, f"parallel.tp={tp_size}", f"run_dir={run_dir}", "optim.lr=1e-30", "optim.min_lr=0"]
    command = torchrun(tp_size, *overrides, f"init_from={pooled}")
    done = finished(command, tmp_path)
    assert done.exit_code == 0, done.stderr
    assert f"weights from {pooled} (llama)" in done.stderr
    (loss,) = [row["train/loss"] for row in read_history(run_dir) if "train/loss" in row]
    # fp32, another order of sums
    assert loss == pytest.approx(loss_in_transformers(pooled, cache.partition("=")[2]), rel=1e-5)

    exported = tmp_path / "exported"
    back = convert(tmp_path, f"source={run_dir}", f"target={exported}")
    assert back.exit_code == 0, back.stderr
    before, after = state(pooled), state(exported)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    again = finished(command, tmp_path)
    assert again.exit_code == 0 and f"init_from ({pooled}) is not read: a checkpoint is resumed" in again.stderr


def loss_in_transformers(folder: Path, cache_dir: str) -> float:
    """Of the first global batch."""
    datasets = build_datasets(
        [stdlib_corpus("byte", cache_dir)],
        load_tokenizer("byte"),
        seq_len=32,
        train_samples=2,
        valid_samples=0,
        seed=1234,
        cache_dir=cache_dir,
    )
    samples = [datasets.train[number] for number in range(2)]
    tokens, labels = (torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("tokens", "labels"))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
