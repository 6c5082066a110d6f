"""The typed configuration: every key, its type and its default. The YAML files of this folder choose values.

Hydra configs stop at ``launch/`` and ``training/``; the layers below see integers and Megatron configs.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Activation(Enum):
    swiglu = "swiglu"
    geglu = "geglu"  # gated, GELU by tanh
    gelu = "gelu"


class Normalization(Enum):
    rmsnorm = "rmsnorm"
    layernorm = "layernorm"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"  # bf16 on CUDA, fp32 on the CPU


class Recompute(Enum):
    none = "none"
    selective = "selective"  # core attention
    full = "full"  # every layer


class WandbMode(Enum):
    auto = "auto"  # WANDB_MODE, else online where a key is found, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


class RopeScalingType(Enum):
    none = "none"
    linear = "linear"
    llama3 = "llama3"
    dynamic = "dynamic"
    yarn = "yarn"


@dataclass
class RopeScalingConfig:
    """Stretching rotary positions to longer contexts; what a type does not name, it does not read."""

    type: RopeScalingType = RopeScalingType.none
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # llama3, dynamic, yarn: the length first trained at
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; null: from factor


@dataclass
class ModelConfig:
    """A decoder-only transformer with grouped-query attention."""

    name: str = MISSING
    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING  # num_heads is MHA, 1 is MQA
    head_dim: int | None = None  # null: hidden_size / num_heads
    ffn_hidden_size: int = MISSING
    vocab_size: int | None = None  # null: the tokenizer's
    max_position_embeddings: int = MISSING  # the longest sequence that the model is meant for
    activation: Activation = Activation.swiglu
    normalization: Normalization = Normalization.rmsnorm
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # share of each head's components that turn
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    qkv_bias: bool = False
    linear_bias: bool = False  # biases of the output projection and the MLP (and of QKV)
    qk_norm: bool = False
    tie_embeddings: bool = False
    window: int | None = None  # keys that a query of a local layer sees, itself included; null: no local layers
    global_every: int | None = None  # every so many-th layer has no window; null: all layers have it
    local_rope_theta: float | None = None  # of local layers, unscaled; null: as the others
    softmax_scale: float | None = None  # null: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # largest attention score, approached by tanh
    logit_softcap: float | None = None  # largest logit, approached by tanh
    sinks: bool = False  # a learned logit per query head that takes attention from all keys
    output_gate: bool = False  # each head's output times the sigmoid of a projection of its own
    post_norms: bool = False  # norms also on the outputs of attention and MLP
    zero_centered_norm: bool = False  # RMSNorm multiplies by 1 + weight
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of the outputs of attention and MLP
    logit_multiplier: float = 1.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_std: float = 0.02


@dataclass
class ParallelConfig:
    tp: int = 1  # tensor-parallel ranks; data parallelism takes the rest
    cp: int = 1  # context-parallel ranks
    sequence_parallel: bool = False
    timeout_s: float = 600.0  # a collective that waits longer ends the run


@dataclass
class ZeroConfig:
    stage: int = 1  # 0 nothing, 1 optimizer, 2 + gradients, 3 + parameters sharded over data parallelism


@dataclass
class OptimConfig:
    """AdamW, linear warm-up, cosine decay."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int | None = None  # null: a tenth of the decay
    decay_steps: int | None = None  # null: train.steps
    weight_decay: float = 0.1  # matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad_norm: float = 1.0  # 0: off


@dataclass
class DataConfig:
    """Megatron indexed datasets (``PREFIX.bin`` + ``PREFIX.idx``)."""

    paths: list[str] = field(default_factory=list)  # prefixes; empty: the source of the Python standard library
    weights: list[float] | None = None  # one per path; null: by size
    split: str = "95,5,0"  # train, validation, test
    isolate_documents: bool = False  # no attention across documents of a sequence; positions restart
    tokenizer: str = "byte"  # byte, or a folder / tokenizer.json of Hugging Face
    cache_dir: str | None = None  # null: ~/.cache/gqa_parallel
    num_workers: int = 0  # loader processes per rank


@dataclass
class TrainConfig:
    steps: int = 1000
    seq_len: int = 1024
    micro_batch_size: int = 1  # sequences per rank and forward pass
    global_batch_size: int = 8  # sequences per optimizer step
    seed: int = 1234
    precision: Precision = Precision.auto
    recompute: Recompute = Recompute.none
    log_interval: int = 1  # steps
    eval_interval: int = 100  # steps; 0: only at the end
    eval_batches: int = 8  # global batches


@dataclass
class CheckpointConfig:
    interval: int = 500  # steps; 0: only at the end
    save_final: bool = True
    keep_last: int | None = None  # of the newest checkpoints; null: all
    keep_every: int | None = None  # those at multiples of so many steps stay besides
    keep_best: bool = True  # the one with the lowest validation loss stays besides


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    project: str = "gqa_parallel"
    entity: str | None = None
    name: str | None = None  # null: the run directory's name
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout_s: float = 15.0
    finish_timeout_s: float = 30.0


@dataclass
class DebugConfig:
    """Switches that slow a run down."""

    check_shared_parameters: bool = False  # after every step, compare the copies of each shared parameter
    log_level: str = "INFO"


@dataclass
class Config:
    model: ModelConfig = MISSING
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    run_dir: str | None = None  # null: runs/<model>-<run id>
    init_from: str | None = None  # weights to start from: a model folder of Hugging Face or a checkpoint of ours
    resume: str = "auto"  # auto: the run directory's newest checkpoint, if any; none; or a checkpoint folder
    experiment: Any = None


def register() -> None:
    """Tell Hydra the schema, so that a wrong key or type fails while the configuration is composed."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, node in {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "zero": ZeroConfig,
        "optim": OptimConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "checkpoint": CheckpointConfig,
        "wandb": WandbConfig,
        "debug": DebugConfig,
    }.items():
        store.store(group=group, name="schema", node=node)
