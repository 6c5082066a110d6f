"""One layer of ours on every rank, with the dense reference's weights; run inside the ranks."""

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from gqa_parallel.attention.reference import DenseGroupedQueryAttention
from gqa_parallel.attention.rotary import Rotation
from gqa_parallel.attention.shared_parameters import sum_shared_gradients
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.layer_spec import gqa_layer_spec
from gqa_parallel.megatron.self_attention import GQASelfAttention
from gqa_parallel.partition.qkv_layout import huggingface_layout, rank_layout, row_map


def dense_reference(shape: dict, seed: int = 0) -> DenseGroupedQueryAttention:
    """float64, with every weight, bias and norm away from its usual start."""
    torch.manual_seed(seed)
    dense = DenseGroupedQueryAttention(**shape).double()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return dense


def layer_config(shape: dict, tp_size: int, **settings) -> GQATransformerConfig:
    """The Megatron config of a ``DenseGroupedQueryAttention``'s arguments."""
    has_norm = shape.get("qk_norm_eps") is not None
    window = shape.get("window")
    return GQATransformerConfig(
        num_layers=1,
        hidden_size=shape["hidden_size"],
        num_attention_heads=shape["num_heads"],
        num_query_groups=shape["num_kv_heads"],
        kv_channels=shape["head_dim"],
        tensor_model_parallel_size=tp_size,
        add_qkv_bias=shape.get("qkv_bias", False),
        add_bias_linear=shape.get("output_bias", False),
        qk_layernorm=has_norm,
        normalization="RMSNorm",
        window_size=None if window is None else (window - 1, 0),
        attention_softcap=shape.get("softcap"),
        softmax_scale=shape.get("softmax_scale"),
        softmax_type="learnable" if shape.get("sinks") else "vanilla",
        attention_output_gate=shape.get("output_gate", False),
        layernorm_epsilon=shape["qk_norm_eps"] if has_norm else 1e-5,
        **{"params_dtype": torch.float64, "attention_dropout": 0.0, "hidden_dropout": 0.0, **settings},
    )


def build_layer(config: GQATransformerConfig, seed: int = 0) -> GQASelfAttention:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    spec = gqa_layer_spec(config).submodules.self_attention
    return GQASelfAttention(config, spec.submodules, layer_number=1, pg_collection=groups)


def local_rows(layer: GQASelfAttention) -> list[int]:
    """The rows of a dense [q; k; v] or [q; k; v; g] weight that this rank holds, in its order."""
    partition = layer.partition
    source = huggingface_layout(partition.num_heads, partition.num_kv_heads)
    source += [("g", head) for head in range(partition.num_heads) if layer.output_gate]
    return row_map(source, rank_layout(partition, layer.tp_rank, layer.output_gate), layer.head_dim)


def local_columns(layer: GQASelfAttention) -> slice:
    heads = _local_heads(layer)
    return slice(heads.start * layer.head_dim, heads.stop * layer.head_dim)


def _local_heads(layer: GQASelfAttention) -> slice:
    heads = layer.partition.query_heads(layer.tp_rank)
    return slice(heads.start, heads.stop)


def qkv(dense: DenseGroupedQueryAttention, name: str, grad: bool = False) -> Tensor | None:
    """The dense ``weight`` or ``bias`` of q, k, v (and g) below each other, or its gradient."""
    projections = [dense.q_proj, dense.k_proj, dense.v_proj, *([dense.g_proj] if dense.g_proj else [])]
    parts = [getattr(projection, name) for projection in projections]
    return None if parts[0] is None else torch.cat([part.grad if grad else part for part in parts])


@torch.no_grad()
def load_dense(layer: GQASelfAttention, dense: DenseGroupedQueryAttention) -> None:
    """Give ``layer`` its shards of the dense weights."""
    rows = local_rows(layer)
    bias = qkv(dense, "bias")
    layer.load_qkv(qkv(dense, "weight")[rows], None if bias is None else bias[rows])
    layer.linear_proj.weight.copy_(dense.o_proj.weight[:, local_columns(layer)])
    if layer.linear_proj.bias is not None:
        layer.linear_proj.bias.copy_(dense.o_proj.bias)
    if dense.sinks is not None:
        layer.core_attention.softmax_offset.copy_(dense.sinks[_local_heads(layer)])
    if layer.q_layernorm is not None:
        layer.q_layernorm.weight.copy_(dense.q_norm.weight)
        layer.k_layernorm.weight.copy_(dense.k_norm.weight)


def expected_gradients(layer: GQASelfAttention, dense: DenseGroupedQueryAttention) -> dict[str, Tensor]:
    """For every parameter of ``layer``, its shard of the dense gradient."""
    rows, expected = local_rows(layer), {}
    linears = ["linear_q", "linear_kv"] if layer.partition.replicates_kv else ["linear_qkv"]
    for name in ("weight", "bias"):
        full = qkv(dense, name, grad=True) if qkv(dense, name) is not None else None
        if full is not None:
            widths = [getattr(layer, linear).weight.shape[0] for linear in linears]
            for linear, part in zip(linears, full[rows].split(widths), strict=True):
                expected[f"{linear}.{name}"] = part
    expected["linear_proj.weight"] = dense.o_proj.weight.grad[:, local_columns(layer)]
    if layer.linear_proj.bias is not None:
        expected["linear_proj.bias"] = dense.o_proj.bias.grad
    if dense.sinks is not None:
        expected["core_attention.softmax_offset"] = dense.sinks.grad[_local_heads(layer)]
    if layer.q_layernorm is not None:
        expected["q_layernorm.weight"] = dense.q_norm.weight.grad
        expected["k_layernorm.weight"] = dense.k_norm.weight.grad
    return expected


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def compare_with_dense(
    shape: dict, settings: dict, rotary_dim: int | None = None, documents: list[int] | None = None
) -> dict[str, float]:
    """Forward and backward of one layer against the dense reference on every rank.

    Args:
        shape: arguments of ``DenseGroupedQueryAttention``.
        settings: further ones of the Megatron config.
        rotary_dim: components that turn; None: all.
        documents: lengths of packed documents (multiples of 12 in all); None: three rows of 12 tokens.
    Returns:
        Relative error of the output, the input gradient and every weight gradient.
    """
    tp_group = parallel_state.get_tensor_model_parallel_group()
    tp_size, tp_rank = tp_group.size(), tp_group.rank()
    sequence, batch = (sum(documents), 1) if documents else (12, 3)
    dense = dense_reference(shape)
    layer = build_layer(layer_config(shape, tp_size, **settings))
    load_dense(layer, dense)
    sum_shared_gradients(layer, tp_group)

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sequence, batch, shape["hidden_size"], dtype=torch.float64, generator=generator)
    grad_out = torch.randn(hidden.shape, dtype=torch.float64, generator=generator)
    half_angles = torch.rand(sequence, (rotary_dim or shape["head_dim"]) // 2, generator=generator).double() * 6
    if settings.get("rotary_interleaved"):
        angles = half_angles.repeat_interleave(2, dim=-1)
    else:
        angles = half_angles.repeat(1, 2)

    packed, starts, positions = None, None, torch.arange(sequence)
    if documents:
        bounds = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0).int()
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        starts = bounds[:-1].long().repeat_interleave(torch.tensor(documents))
        positions = torch.cat([torch.arange(length) for length in documents])
    rotation = Rotation(angles[positions], settings.get("rotary_interleaved", False))

    hidden_dense = hidden.clone().requires_grad_()
    out_dense = dense(hidden_dense, rotation, starts)
    out_dense.backward(grad_out)

    mine = slice(None)
    if layer.config.sequence_parallel:
        mine = slice(tp_rank * sequence // tp_size, (tp_rank + 1) * sequence // tp_size)
    hidden_local = hidden[mine].clone().requires_grad_()
    out, bias = layer(hidden_local, rotary_pos_emb=angles[:, None, None], packed_seq_params=packed)
    out = out if bias is None else out + bias
    out.backward(grad_out[mine])

    errors = {
        "output": relative_error(out, out_dense[mine]),
        "input gradient": relative_error(hidden_local.grad, hidden_dense.grad[mine]),
    }
    expected = expected_gradients(layer, dense)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert gradients.keys() == expected.keys()
    errors |= {name: relative_error(gradients[name], expected[name]) for name in expected}
    return errors
