"""Every refusal of ``check``, by its whole message."""

from functools import reduce

import pytest

from gqa_parallel.conf.checks import check
from gqa_parallel.conf.model_shape import head_dim, model_shape
from gqa_parallel.conf.schema import Activation, Config, ModelConfig, Normalization, Precision, RopeScalingType
from gqa_parallel.errors import UserError


def small(**changes) -> Config:
    """A sound configuration, changed at keys written ``group__key``."""
    config = Config(
        model=ModelConfig(
            name="small",
            num_layers=2,
            hidden_size=48,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=96,
            max_position_embeddings=2048,
        )
    )
    for key, value in changes.items():
        *groups, name = key.split("__")
        setattr(reduce(getattr, groups, config), name, value)
    return config


def message(world_size: int, cuda: bool | None, **changes) -> str:
    with pytest.raises(UserError) as error:
        check(small(**changes), world_size, cuda)
    return str(error.value)


@pytest.mark.parametrize("cuda", [None, False, True])
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (8, {"parallel__tp": 4}),
        (1, {"parallel__sequence_parallel": True}),
        (4, {"parallel__tp": 4, "parallel__sequence_parallel": True}),
        (1, {"train__precision": Precision.fp32, "zero__stage": 0}),
        (1, {"train__precision": Precision.bf16, "zero__stage": 3}),
        (1, {"train__eval_batches": 0, "data__split": "1,0,0"}),
        (1, {"optim__warmup_steps": 0, "train__steps": 1}),
        (1, {"data__paths": ["a", "b"], "data__weights": [0.5, 2.0]}),
        (1, {"model__head_dim": 10, "model__hidden_size": 50}),
        (1, {"optim__min_lr": 0.0, "optim__clip_grad_norm": 0.0, "checkpoint__interval": 0}),
    ],
)
def test_sound_configurations_pass(world_size, changes, cuda):
    check(small(**changes), world_size, cuda)


@pytest.mark.parametrize(
    ("key", "value", "requirement"),
    [
        ("model.num_layers", 0, "at least 1"),
        ("model.hidden_size", -48, "at least 1"),
        ("model.num_heads", 0, "at least 1"),
        ("model.head_dim", 0, "at least 1"),
        ("model.vocab_size", 0, "at least 1"),
        ("parallel.tp", 0, "at least 1"),
        ("parallel.cp", 0, "at least 1"),
        ("train.steps", 0, "at least 1"),
        ("train.micro_batch_size", 0, "at least 1"),
        ("train.global_batch_size", 0, "at least 1"),
        ("train.log_interval", 0, "at least 1"),
        ("optim.decay_steps", 0, "at least 1"),
        ("optim.lr", 0.0, "greater than 0"),
        ("optim.lr", float("nan"), "greater than 0"),
        ("parallel.timeout_s", -1.0, "greater than 0"),
        ("optim.min_lr", -1e-5, "at least 0"),
        ("optim.warmup_steps", -1, "at least 0"),
        ("train.eval_interval", -1, "at least 0"),
        ("checkpoint.interval", -1, "at least 0"),
        ("checkpoint.keep_last", 0, "at least 1"),
        ("checkpoint.keep_every", 0, "at least 1"),
        ("optim.beta1", 1.0, "at least 0 and less than 1"),
        ("optim.beta2", -0.1, "at least 0 and less than 1"),
        ("model.attention_dropout", 1.0, "at least 0 and less than 1"),
        ("model.hidden_dropout", 1.5, "at least 0 and less than 1"),
        ("zero.stage", 4, "0, 1, 2 or 3"),
        ("zero.stage", -1, "0, 1, 2 or 3"),
    ],
)
def test_ranges(key, value, requirement):
    found = message(1, None, **{key.replace(".", "__"): value})
    assert found == f"{key} ({value}) must be {requirement}."


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (
            6,
            {"parallel__tp": 4},
            "world_size (6) must be a multiple of parallel.tp (4) x parallel.cp (1): the ranks form whole "
            "tensor-parallel groups. Start 4 or 8 ranks with torchrun --nproc-per-node, or use parallel.tp=1, 2 or 3.",
        ),
        (
            0,
            {"parallel__tp": 2},
            "world_size (0) must be a multiple of parallel.tp (2) x parallel.cp (1): the ranks form whole "
            "tensor-parallel groups. Start 2 ranks with torchrun --nproc-per-node.",
        ),
        (
            2,
            {"parallel__cp": 2},
            "parallel.cp (2) must be 1: this attention layer does not support context parallelism yet. "
            "Use parallel.cp=1; parallel.sequence_parallel=true shards the activations outside attention.",
        ),
        (
            1,
            {"model__num_kv_heads": 3},
            "num_heads (4) must be a multiple of num_kv_heads (3): the query heads of a group share one "
            "KV head. Use num_kv_heads 1, 2 or 4.",
        ),
        (
            8,
            {"parallel__tp": 8},
            "tp (8) must be at most num_heads (4): a rank without a query head would be idle. Use tp 4 or less.",
        ),
        (
            1,
            {"model__hidden_size": 50},
            "model.hidden_size (50) must be a multiple of model.num_heads (4): model.head_dim is null and "
            "stands for their quotient. Set model.head_dim.",
        ),
        (
            1,
            {"model__head_dim": 7},
            "model.head_dim (7) must be a multiple of 2: rotary embeddings turn pairs of components. "
            "Use model.head_dim=6 or 8.",
        ),
        (
            1,
            {"model__head_dim": 1},
            "model.head_dim (1) must be a multiple of 2: rotary embeddings turn pairs of components. "
            "Use model.head_dim=2.",
        ),
        (
            4,
            {"parallel__tp": 4, "model__ffn_hidden_size": 90},
            "model.ffn_hidden_size (90) must be a multiple of parallel.tp (4): the ranks hold equal "
            "slices of the MLP. Use parallel.tp=1, 2 or 3, or model.ffn_hidden_size=88 or 92.",
        ),
        (
            1,
            {"train__seq_len": 4096},
            "train.seq_len (4096) must be at most model.max_position_embeddings (2048): the model is "
            "meant for no longer sequence. Use train.seq_len=2048, or raise model.max_position_embeddings.",
        ),
        (
            4,
            {"parallel__tp": 4, "parallel__sequence_parallel": True, "train__seq_len": 1022},
            "train.seq_len (1022) must be a multiple of parallel.tp (4) under sequence parallelism: the "
            "ranks hold equal parts of the sequence. Use train.seq_len=1020 or 1024, or "
            "parallel.sequence_parallel=false.",
        ),
        (
            1,
            {"optim__min_lr": 1e-2, "optim__lr": 1e-3},
            "optim.min_lr (0.01) must be at most optim.lr (0.001): the learning rate decays from lr to "
            "min_lr. Use optim.min_lr=0.0001.",
        ),
        (
            1,
            {"optim__warmup_steps": 100, "train__steps": 50},
            "optim.warmup_steps (100) must be less than train.steps (50): the decay follows the warm-up. "
            "Use optim.warmup_steps=5.",
        ),
        (
            1,
            {"optim__warmup_steps": 100, "optim__decay_steps": 100},
            "optim.warmup_steps (100) must be less than optim.decay_steps (100): the decay follows the "
            "warm-up. Use optim.warmup_steps=10.",
        ),
        (
            1,
            {"train__precision": Precision.bf16, "zero__stage": 0},
            "zero.stage (0) must be at least 1 for train.precision (bf16): DeepSpeed's 16-bit optimizers "
            "outside ZeRO take a wrong gradient norm under tensor parallelism. Use zero.stage=1 or "
            "train.precision=fp32.",
        ),
        (
            1,
            {"data__paths": ["a", "b"], "data__weights": [1.0]},
            "data.weights ([1.0]) must be one positive number per entry of data.paths (['a', 'b']): each is a share of "
            "the samples. Use data.weights=null to weigh by size.",
        ),
        (
            1,
            {"data__paths": ["a", "b"], "data__weights": [1.0, -1.0]},
            "data.weights ([1.0, -1.0]) must be one positive number per entry of data.paths (['a', 'b']): each is a "
            "share of the samples. Use data.weights=null to weigh by size.",
        ),
        (
            1,
            {"data__split": "100,0,0"},
            "data.split (100,0,0) must leave a share for validation, its second value, while "
            "train.eval_batches (8) asks for evaluation. Use \"data.split='95,5,0'\", or "
            "train.eval_batches=0.",
        ),
        (
            1,
            {"model__global_every": 2},
            "model.global_every (2) must be null without model.window (null): it tells local layers from others. "
            "Set model.window, or model.global_every=null.",
        ),
        (
            1,
            {"model__rope_fraction": 0.3},
            "model.rope_fraction (0.3) must leave an even number of the components of model.head_dim (12), at most "
            "all: they turn in pairs. Use model.rope_fraction=1 or 0.1667.",
        ),
        (
            1,
            {"model__rope_scaling__type": RopeScalingType.yarn},
            "model.rope_scaling.original_max_position_embeddings (null) must be set for model.rope_scaling.type "
            "(yarn): it stretches from that length. Set it to the length first trained at.",
        ),
        (
            1,
            {"model__rope_scaling__factor": 2.0},
            "model.rope_scaling.factor (2.0) must be 1 for model.rope_scaling.type (none): nothing would read it. "
            "Set model.rope_scaling.type.",
        ),
        (
            1,
            {"model__zero_centered_norm": True, "model__normalization": Normalization.layernorm},
            "model.normalization (layernorm) must be rmsnorm with model.zero_centered_norm (true): only RMSNorm has "
            "that form. Use model.zero_centered_norm=false.",
        ),
        *(
            (
                1,
                {"data__split": split},
                f"data.split ({split}) must be up to three numbers, the first > 0: they are the shares of training, "
                "validation and test documents. Use \"data.split='95,5,0'\".",
            )
            for split in ("95,5,1,1", "95,5,x", "", "0,5,5", "95,-5,0", "nan,1,1")
        ),
    ],
)
def test_messages(world_size, changes, expected):
    assert message(world_size, None, **changes) == expected


def test_batch_message_names_all_three_values():
    found = message(6, None, parallel__tp=2, train__global_batch_size=8, train__micro_batch_size=1)
    assert found.startswith("train.global_batch_size (8) must be a multiple of train.micro_batch_size (1)")
    assert "data-parallel" in found
    assert "(3)" in found
    assert found.endswith("Use train.global_batch_size=6 or 9.")


def test_what_depends_on_cuda():
    assert message(1, True, zero__stage=0).startswith(
        "zero.stage (0) must be at least 1 for train.precision (auto, bf16 on CUDA): "
    )
    assert message(1, False, train__precision=Precision.fp16) == (
        "train.precision (fp16) must be bf16, fp32 or auto without CUDA (none found): fp16 is for GPUs. "
        "Use train.precision=auto."
    )
    check(small(zero__stage=0), 1, cuda=False)
    check(small(train__precision=Precision.fp16), 1, cuda=True)


def test_head_dim():
    assert head_dim(small().model) == 12
    assert head_dim(small(model__head_dim=10).model) == 10


def test_model_shape():
    changes = {
        "model__activation": Activation.gelu,
        "model__normalization": Normalization.layernorm,
        "model__qkv_bias": True,
        "model__tie_embeddings": True,
    }
    shape = model_shape(small(**changes).model, vocab_size=257, tp_size=4)
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.num_kv_heads) == (2, 48, 4, 2)
    assert (shape.head_dim, shape.ffn_hidden_size, shape.vocab_size) == (12, 96, 384)
    assert (shape.gated_mlp, shape.layernorm_bias, shape.qkv_bias) == (False, True, True)
    assert (shape.linear_bias, shape.qk_norm, shape.tie_embeddings) == (False, False, True)
