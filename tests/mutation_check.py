"""Plants faults in a copy of the code and sees whether the suite catches each: ``make mutants`` (about five minutes).

A fault that survives means that some claim has no test that would fail if it were false.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYER = ("tests/distributed/test_layer_against_dense.py",)
VARIANTS = ("tests/distributed/test_variants_against_dense.py",)
TRAINING = ("tests/distributed/test_training.py",)
MEGATRON = ("tests/distributed/test_megatron.py",)
RESUME = ("tests/distributed/test_resume.py",)
PARTITION = ("tests/unit/partition",)


@dataclass(frozen=True)
class Fault:
    """``before`` becomes ``after`` in ``file``; one of ``tests`` must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


FAULTS = [
    Fault(
        "no gradient sum over KV replicas",
        "attention/grouped_query_attention.py",
        "share(linear_kv, kv_replica_group)",
        "pass",
        LAYER,
    ),
    Fault(
        "no gradient sum of the query norm",
        "attention/grouped_query_attention.py",
        "share(q_layernorm, tp_group)",
        "pass",
        LAYER,
    ),
    Fault(
        "gradient averaged instead of summed",
        "attention/shared_parameters.py",
        "return grad\n",
        "return grad / group.size()\n",
        LAYER,
    ),
    Fault(
        "query heads of a group swapped",
        "attention/grouped_query_attention.py",
        "(part.flatten(2, 3) for part in q_parts)",
        "(part.flip(3).flatten(2, 3) for part in q_parts)",
        LAYER,
    ),
    Fault(
        "KV head taken from the neighbour",
        "attention/grouped_query_attention.py",
        "k_SBG1H.squeeze(3), v",
        "k_SBG1H.squeeze(3).roll(1, 2), v",
        LAYER,
    ),
    Fault(
        "K and V exchanged where KV is replicated",
        "attention/grouped_query_attention.py",
        "k_SBG1H, v_SBG1H = kv",
        "v_SBG1H, k_SBG1H = kv",
        LAYER,
    ),
    Fault(
        "keys not rotated",
        "attention/grouped_query_attention.py",
        "q_SBNH, k_SBGH = rotation(q_SBNH), rotation(k_SBGH)",
        "q_SBNH = rotation(q_SBNH)",
        LAYER,
    ),
    Fault(
        "window off by one",
        "attention/core_attention.py",
        "- (self.window - 1)",
        "- self.window",
        VARIANTS,
    ),
    Fault(
        "a document sees the last token of the one before",
        "attention/blocked.py",
        "key_L >= first_key_Q[:, None]",
        "key_L >= first_key_Q[:, None] - 1",
        VARIANTS,
    ),
    Fault(
        "positions go on in the next document",
        "megatron/self_attention.py",
        "angles_SR[torch.arange(seq_len, device=device) - document_start_S]",
        "angles_SR[torch.arange(seq_len, device=device)]",
        VARIANTS,
    ),
    Fault(
        "soft-cap before the scale",
        "attention/blocked.py",
        "(scores_BGRQL / softcap).tanh()",
        "(scores_BGRQL / scale / softcap).tanh() * scale",
        VARIANTS,
    ),
    Fault(
        "sinks of the first rank on every rank",
        "attention/blocked.py",
        "sinks = sinks_N.to",
        "sinks = sinks_N.roll(1).to",
        VARIANTS,
    ),
    Fault(
        "gates of a group in the order of the KV heads",
        "partition/qkv_layout.py",
        '[("g", head) for head in local if gated]',
        '[("g", head) for head in reversed(local) if gated]',
        VARIANTS,
    ),
    Fault(
        "all scores kept for the backward pass",
        "attention/blocked.py",
        "            checkpoint(\n                _one_block,",
        "            (lambda block, *args, use_reentrant, preserve_rng_state: block(*args))(\n"
        "                _one_block,",
        ("tests/unit/attention/test_backends.py",),
    ),
    Fault(
        "no causal mask",
        "attention/core_attention.py",
        "is_causal=True",
        "is_causal=False",
        LAYER,
    ),
    Fault(
        "softmax scale of the hidden size",
        "attention/core_attention.py",
        "scale=self.softmax_scale",
        "scale=q_BNSH.shape[1] ** -0.5",
        LAYER,
    ),
    Fault(
        "input gradient not summed where KV is replicated",
        "megatron/self_attention.py",
        "return copy_to_tensor_model_parallel_region(hidden_SBD, group=tp_group)",
        "return hidden_SBD",
        LAYER,
    ),
    Fault(
        "uneven share given to the last ranks",
        "partition/heads.py",
        "start = index * share + min(index, larger)\n    return range(start, start + share + (index < larger))",
        "start = index * share + max(0, index - parts + larger)\n"
        "    return range(start, start + share + (index >= parts - larger))",
        PARTITION,
    ),
    Fault(
        "shared parameters counted on every rank in the norm",
        "attention/shared_parameters.py",
        "parameter.tensor_model_parallel = group.rank() == 0",
        "parameter.tensor_model_parallel = True",
        TRAINING,
    ),
    Fault(
        "replicated KV counted on rank 0 only",
        "attention/shared_parameters.py",
        "parameter.tensor_model_parallel = group.rank() == 0",
        "parameter.tensor_model_parallel = False",
        TRAINING,
    ),
    Fault(
        "hooks forgotten under DeepSpeed",
        "deepspeed/engine.py",
        "sum_shared_gradients(engine.module, tp_group)",
        "pass",
        TRAINING,
    ),
    Fault(
        "norms not summed under sequence parallelism",
        "megatron/norm.py",
        "parameter.sequence_parallel = config.sequence_parallel",
        "pass",
        TRAINING,
    ),
    Fault(
        "weights drawn per rank",
        "megatron/self_attention.py",
        "[mine].flatten(0, 1))",
        "[: len(mine)].flatten(0, 1))",
        (*TRAINING, *MEGATRON),
    ),
    Fault(
        "a replica stored as if it were the head's owner, in the neighbour's place",
        "megatron/sharding.py",
        "indices = block_map(everything, its_blocks)",
        "indices = sorted(block_map(everything, its_blocks))[::-1]",
        MEGATRON,
    ),
    Fault(
        "second moments not restored",
        "checkpoint/state.py",
        "tensor.copy_(_read(checkpoint, kind, sharding, rank, fragment))",
        'kind == "exp_avg_sq" or tensor.copy_(_read(checkpoint, kind, sharding, rank, fragment))',
        RESUME,
    ),
    Fault(
        "the optimizer counts its steps from zero",
        "checkpoint/state.py",
        'state["step"].fill_(optimizer_steps)',
        "pass",
        RESUME,
    ),
    Fault(
        "a part whose bytes have changed is read",
        "checkpoint/native.py",
        'if _sha256(path) != expected["sha256"]:',
        "if False:",
        ("tests/unit/checkpoint/test_native.py",),
    ),
    Fault(
        "recomputation draws dropout anew",
        "attention/blocked.py",
        "preserve_rng_state=dropout > 0",
        "preserve_rng_state=False",
        ("tests/unit/attention/test_core_attention.py",),
    ),
]


def caught(fault: Fault) -> bool:
    """Whether a test fails on a copy of the code with ``fault``."""
    with tempfile.TemporaryDirectory(prefix="gqa-mutant-") as folder:
        for part in ("gqa_parallel", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        file = Path(folder) / "gqa_parallel" / fault.file
        code = file.read_text()
        if code.count(fault.before) != 1:
            raise SystemExit(f"{fault.name}: {fault.file} must contain {fault.before!r} once; mend the list of faults")
        file.write_text(code.replace(fault.before, fault.after))
        command = [sys.executable, "-m", "pytest", "-x", "--no-header", *fault.tests]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{fault.name}: the tests could not run\n{done.stdout[-2000:]}")
        return done.returncode == 1


def main() -> None:
    survivors = []
    for number, fault in enumerate(FAULTS, start=1):
        found = caught(fault)
        print(f"{number:>3}/{len(FAULTS)}  {'caught  ' if found else 'SURVIVED'}  {fault.name}", flush=True)
        if not found:
            survivors.append(fault.name)
    print(f"{len(FAULTS) - len(survivors)} of {len(FAULTS)} faults caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
