"""Our layer beside Megatron-Core's own; run inside the ranks."""

import contextlib
import tempfile

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import build_module

from gqa_parallel.deepspeed.config import deepspeed_config
from gqa_parallel.deepspeed.engine import deepspeed_engine
from gqa_parallel.megatron.layer_spec import with_gqa
from tests.distributed.layers import build_layer, dense_reference, layer_config, load_dense, relative_error
from tests.distributed.training_runs import SEQUENCE, VOCAB, build_model, small_config, tokens_of


def megatron_attention(config: TransformerConfig, seed: int = 0) -> SelfAttention:
    build_layer(config, seed)  # sets the seeds as for our layer
    torch.manual_seed(seed)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    return build_module(spec.submodules.self_attention, config=config, layer_number=1, pg_collection=groups)


def error_against_megatron(shape: dict) -> dict[str, float]:
    """Output and gradients of our layer given the weights of Megatron's ``SelfAttention``, fp32."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    config = layer_config(shape, tp_size, params_dtype=torch.float32)
    theirs, ours = megatron_attention(config, seed=1), build_layer(config, seed=2)
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 2, shape["hidden_size"], generator=generator)
    grad = torch.randn(hidden.shape, generator=generator)
    angles = torch.rand(11, 1, 1, shape["head_dim"] // 2, generator=generator).repeat(1, 1, 1, 2)
    inputs, outputs = [], []
    for layer in (ours, theirs):
        x = hidden.clone().requires_grad_()
        out, bias = layer(x, attention_mask=None, rotary_pos_emb=angles)
        out = out if bias is None else out + bias
        out.backward(grad)
        inputs.append(x)
        outputs.append(out)
    errors = {"output": relative_error(*outputs), "input": relative_error(inputs[0].grad, inputs[1].grad)}
    for name, parameter in theirs.named_parameters():
        errors[name] = relative_error(ours.get_parameter(name).grad, parameter.grad)
    return errors


def same_start_as_megatron(shape: dict) -> bool:
    """Whether both layers draw bit-equal weights from one seed."""
    config = layer_config(shape, parallel_state.get_tensor_model_parallel_world_size(), params_dtype=torch.float32)
    theirs, ours = megatron_attention(config, seed=4), build_layer(config, seed=4)
    mine, its = dict(ours.named_parameters()), dict(theirs.named_parameters())
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)


def train_megatrons_own_gpt(steps: int) -> list[float]:
    """Losses of Megatron's local GPT spec with our attention, LayerNorm and biases as Megatron has them by default."""
    config = small_config(add_bias_linear=True, normalization="LayerNorm", qk_layernorm=False)
    build_model(small_config())  # sets the seeds
    torch.manual_seed(5)
    model = GPTModel(
        config=config,
        transformer_layer_spec=with_gqa(get_gpt_layer_local_spec()),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = deepspeed_config(
        stage=1, precision="fp32", micro_batch_size=8, micro_batches_per_step=1, dp_size=1, clip_grad_norm=1.0
    )
    engine = deepspeed_engine(model, settings, optimizer=optimizer)
    losses = []
    for step in range(steps):
        tokens = tokens_of(step)
        positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
        loss = engine(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


SHAPE_TO_STORE = {"hidden_size": 14, "num_heads": 12, "num_kv_heads": 4, "head_dim": 6, "qkv_bias": True}
SHAPE_TO_STORE |= {"output_bias": True, "qk_norm_eps": 1e-5}


def save_layer(folder: str) -> None:
    layer = build_layer(layer_config(SHAPE_TO_STORE, parallel_state.get_tensor_model_parallel_world_size()))
    load_dense(layer, dense_reference(SHAPE_TO_STORE))
    dist_checkpointing.save(layer.sharded_state_dict(metadata=_metadata()), folder)


def load_layer_and_compare(folder: str) -> bool:
    """Whether a layer of this layout reads exactly the dense reference's weights."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    layer, expected = (build_layer(layer_config(SHAPE_TO_STORE, tp_size), seed) for seed in (7, 8))
    load_dense(expected, dense_reference(SHAPE_TO_STORE))
    state = dist_checkpointing.load(layer.sharded_state_dict(metadata=_metadata()), folder)
    layer.load_state_dict(state)
    wanted = dict(expected.named_parameters())
    return all(torch.equal(parameter, wanted[name]) for name, parameter in layer.named_parameters())


def _metadata() -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def dropout_behaviour(settings: dict) -> dict[str, bool]:
    """What attention dropout must and must not change, with every head of every rank alike."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    shape = {"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    runs = {}
    for granularity in (None, "selective"):
        settings = {**settings, "attention_dropout": 0.3, "recompute_granularity": granularity}
        layer = build_layer(layer_config(shape, tp_group.size(), **settings))
        for parameter in layer.parameters():
            parameter.data.fill_(0.1)
        attended = []  # what core attention gave, in each forward pass and recomputation
        layer.core_attention.register_forward_hook(lambda *call, seen=attended: seen.append(call[2].detach()))
        torch.manual_seed(9)
        hidden = torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True)
        with _as_in_a_block(layer.config):
            out, _ = layer(hidden)
        out.sum().backward()
        with _as_in_a_block(layer.config):
            layer(hidden)
        runs[granularity] = {"gradient": hidden.grad, "first": attended[0], "next": attended[-1]}
        layer.eval()
        quiet = [layer(hidden)[0].detach() for _ in range(2)]
    plain, recomputed = runs[None], runs["selective"]
    first_head = plain["first"][..., :4].contiguous()
    everyone = [torch.empty_like(first_head) for _ in range(tp_group.size())]
    dist.all_gather(everyone, first_head, group=tp_group)
    return {
        "each pass draws anew": not torch.equal(plain["first"], plain["next"]),
        "recomputation repeats the draw": torch.equal(plain["gradient"], recomputed["gradient"]),
        "ranks draw differently": all(not torch.equal(everyone[0], other) for other in everyone[1:]),
        "evaluation draws nothing": torch.equal(*quiet),
    }


def _as_in_a_block(config: TransformerConfig) -> contextlib.AbstractContextManager:
    """Under sequence parallelism Megatron's ``TransformerBlock`` draws everything from the rank's own stream."""
    return get_cuda_rng_tracker().fork() if config.sequence_parallel else contextlib.nullcontext()


def temporary_folder() -> str:
    return tempfile.mkdtemp(prefix="gqa-sharded-")
