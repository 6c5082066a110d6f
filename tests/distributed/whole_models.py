"""Whole models built as gqa-train builds them; run inside the ranks."""

import torch
from hydra import compose, initialize_config_module
from megatron.core import parallel_state
from omegaconf import OmegaConf

from gqa_parallel.conf import schema
from gqa_parallel.conf.model_shape import model_shape
from gqa_parallel.partition.cost import parameter_counts
from gqa_parallel.training.build import build_trainee
from gqa_parallel.training.distributed import seed_everything

VOCAB = 300


def configured(*overrides: str) -> schema.Config:
    schema.register()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    with initialize_config_module("gqa_parallel.conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", ["model=debug", f"parallel.tp={tp_size}", *overrides]))


def counted_and_built(overrides: list[str]) -> tuple[int, int]:
    """Parameters of this rank: what the cost model says, and what is there."""
    config = configured(*overrides, "zero.stage=0", "train.precision=fp32")
    seed_everything(config.train.seed)
    trainee = build_trainee(config, VOCAB)
    shape = model_shape(config.model, VOCAB, config.parallel.tp)
    rank = parallel_state.get_tensor_model_parallel_rank()
    counted = parameter_counts(shape, shape.partition(config.parallel.tp), rank).total
    built = sum(parameter.numel() for parameter in trainee.engine.module.parameters())
    trainee.engine.destroy()
    return counted, built


def losses_of_isolated_documents(isolate: bool, changed: bool) -> torch.Tensor:
    """Losses of the tokens after an end of document, in a row whose first document is ``changed`` or not."""
    from gqa_parallel.training.packing import packed_documents

    config = configured("zero.stage=0", "train.precision=fp32", "model.window=7", "model.global_every=2")
    seed_everything(config.train.seed)
    trainee = build_trainee(config, VOCAB)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 256, (1, 24), generator=generator)
    tokens[0, 11] = 0
    if changed:
        tokens[0, :11] = tokens[0, :11].flip(0)
    packed = packed_documents(tokens, eod=0) if isolate else None
    positions = torch.arange(24)[None]
    losses = trainee.engine(tokens, positions, None, labels=tokens.roll(-1, 1), packed_seq_params=packed)
    trainee.engine.destroy()
    return losses[0, 12:-1].detach()
