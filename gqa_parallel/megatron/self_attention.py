"""``GroupedQueryAttention`` as a self-attention of Megatron-Core's ``TransformerLayer``."""

import contextlib
import warnings
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from gqa_parallel.attention.core_attention import CoreAttention
from gqa_parallel.attention.grouped_query_attention import GroupedQueryAttention
from gqa_parallel.attention.rotary import Rotation
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.norm import TorchNorm
from gqa_parallel.megatron.process_groups import alone_group, kv_replica_group
from gqa_parallel.megatron.refusals import refuse_unsupported_arguments, refuse_unsupported_config
from gqa_parallel.megatron.sharding import sharded_heads
from gqa_parallel.partition.heads import HeadPartition
from gqa_parallel.partition.qkv_layout import block_map, megatron_layout, rank_layout


class GQASelfAttention(GroupedQueryAttention):
    """Builds the layer's parts from a Megatron spec and translates Megatron's call.

    Args: those of ``megatron.core.transformer.attention.SelfAttention``; ``submodules.core_attention`` is not used:
    ``CoreAttention`` takes its place.

    Raises:
        UserError: ``config`` asks for something that this layer does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        tp_group = groups.tp
        partition = HeadPartition(config.num_attention_heads, config.num_query_groups, tp_group.size())
        refuse_unsupported_config(config, submodules, attn_mask_type, partition)

        head_dim = config.kv_channels
        num_local_heads = len(partition.query_heads(tp_group.rank()))
        query_width = num_local_heads * head_dim * (2 if config.attention_output_gate else 1)
        kv_width = len(partition.kv_heads(tp_group.rank())) * head_dim
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)

        def column_parallel(width: int, group: torch.distributed.ProcessGroup, name: str) -> nn.Module:
            """A linear of ``width`` outputs on this rank: no collective depends on it, so it may differ by rank."""
            with warnings.catch_warnings():  # on a group of one, sequence parallelism is off by intention
                warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`")
                return build_module(
                    submodules.linear_qkv,
                    config.hidden_size,
                    width * group.size(),
                    config=config,
                    init_method=_left_to_draw_weights,
                    gather_output=False,
                    bias=config.add_bias_linear or config.add_qkv_bias,
                    skip_bias_add=False,
                    is_expert=False,
                    tp_comm_buffer_name=name,
                    tp_group=group,
                )

        def qk_norm(builder: Any) -> nn.Module | None:
            if builder in (None, IdentityOp):
                return None
            builder = TorchNorm if builder is WrappedTorchNorm else builder
            return build_module(builder, hidden_size=head_dim, config=config, eps=config.layernorm_epsilon)

        def gather_input(hidden_SBD: Tensor) -> Tensor:
            if config.sequence_parallel:
                return gather_from_sequence_parallel_region(hidden_SBD, group=tp_group)
            return copy_to_tensor_model_parallel_region(hidden_SBD, group=tp_group)

        recomputes = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        core_attention = (RecomputedCoreAttention if recomputes else CoreAttention)(
            softmax_scale=config.softmax_scale,
            dropout=config.attention_dropout,
            # under sequence parallelism the whole block draws from the ranks' own streams already
            dropout_rng=contextlib.nullcontext if config.sequence_parallel else _rank_rng,
            window=config.window_size[0] + 1 if windowed else None,
            softcap=getattr(config, "attention_softcap", None),
            num_sinks=num_local_heads if config.softmax_type == "learnable" else 0,
        )

        if partition.replicates_kv:
            alone = alone_group(tp_group)
            projections = {
                "linear_q": column_parallel(query_width, alone, "q"),
                "linear_kv": column_parallel(2 * kv_width, alone, "kv"),
                "gather_input": gather_input,
                "kv_replica_group": kv_replica_group(partition, tp_group),
            }
        else:
            projections = {"linear_qkv": column_parallel(query_width + 2 * kv_width, tp_group, "qkv")}
        super().__init__(
            partition=partition,
            tp_rank=tp_group.rank(),
            head_dim=head_dim,
            core_attention=core_attention,
            linear_proj=build_module(
                submodules.linear_proj,
                num_local_heads * head_dim * tp_group.size(),
                config.hidden_size,
                config=config,
                init_method=_left_to_draw_weights,
                bias=config.add_bias_linear,
                input_is_parallel=True,
                skip_bias_add=True,
                is_expert=False,
                tp_comm_buffer_name="proj",
                tp_group=tp_group,
            ),
            **projections,
            q_layernorm=qk_norm(submodules.q_layernorm),
            k_layernorm=qk_norm(submodules.k_layernorm),
            output_gate=config.attention_output_gate,
            tp_group=tp_group,
        )
        if core_attention.softmax_offset is not None:
            core_attention.to(dtype=config.params_dtype, device=self.linear_proj.weight.device)
            core_attention.softmax_offset.tensor_model_parallel = True
        local_rope = getattr(config, "local_rope", None) if windowed else None
        self.rope = local_rope or getattr(config, "rope", None)
        self.config = config
        self.layer_number = layer_number
        self.tp_group = tp_group
        if config.perform_initialization:
            self.draw_weights()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's call of a self-attention.

        Args:
            hidden_states: [S, B, D], or [S / T, B, D] under sequence parallelism.
            rotary_pos_emb: [S, 1, 1, R] angles, the same for queries and keys; not used where ``config.rope`` is set.
            packed_seq_params: documents packed one after the other into one row (``qkv_format="thd"``, B = 1): no
                attention from one to another, positions restart.
            The others must be None; the mask is causal.
        Returns:
            Output, shaped like ``hidden_states``, and the output projection's bias.
        Raises:
            UserError: an argument that this layer does not support is given.
        """
        refuse_unsupported_arguments(
            attention_mask=attention_mask,
            key_value_states=key_value_states,
            inference_context=inference_context,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            rotary_pos_cos_sin=rotary_pos_cos_sin,
            attention_bias=attention_bias,
            sequence_len_offset=sequence_len_offset,
            inference_params=inference_params,
        )
        seq_len = len(hidden_states) * (self.tp_group.size() if self.config.sequence_parallel else 1)
        document_start_S = None
        if packed_seq_params is not None:
            document_start_S = document_starts(packed_seq_params, seq_len, hidden_states.device)
        rotation = self._rotation(rotary_pos_emb, seq_len, document_start_S, hidden_states.device)
        return super().forward(hidden_states, rotation, document_start_S)

    def _rotation(
        self,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None,
        seq_len: int,
        document_start_S: Tensor | None,
        device: torch.device,
    ) -> Rotation | None:
        """The turn of each position, which restarts with each document; None: the layer knows no positions."""
        interleaved, factor = self.config.rotary_interleaved, 1.0
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:
            return None
        if self.rope is not None:
            angles_SR = self.rope.angles(self.head_dim, seq_len, interleaved, device)
            factor = self.rope.attention_factor
        elif rotary_pos_emb is not None:
            angles_SR = (rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb)[:, 0, 0]
        else:
            return None
        if document_start_S is not None:
            angles_SR = angles_SR[torch.arange(seq_len, device=device) - document_start_S]
        return Rotation(angles_SR, interleaved, factor)

    @torch.no_grad()
    def draw_weights(self) -> None:
        """Draw the full weights, in Megatron's order and layout, and keep this rank's heads.

        All tensor-parallel ranks must be at the same state of the default generator; the start then does not depend
        on their number. Biases start at zero.
        """
        config, device = self.config, self.linear_proj.weight.device
        heads, kv_heads = self.partition.num_heads, self.partition.num_kv_heads

        proj = torch.empty(config.hidden_size, heads * self.head_dim, dtype=torch.float32, device=device)
        config.output_layer_init_method(proj)
        query_heads = self.partition.query_heads(self.tp_rank)
        self.linear_proj.weight.copy_(proj.unflatten(1, (heads, -1))[:, query_heads].flatten(1))

        everything = megatron_layout(heads, kv_heads, self.output_gate)
        qkv = torch.empty(len(everything) * self.head_dim, config.hidden_size, dtype=torch.float32, device=device)
        config.init_method(qkv)
        mine = block_map(everything, rank_layout(self.partition, self.tp_rank, self.output_gate))
        self.load_qkv(qkv.unflatten(0, (-1, self.head_dim))[mine].flatten(0, 1))

        for name, parameter in self.named_parameters():
            if name.endswith("bias") and "layernorm" not in name:
                parameter.zero_()

    @torch.no_grad()
    def load_qkv(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Set the QKV projection from this rank's rows.

        Args:
            weight: [(N + 2G) * H, D], with an output gate [(2N + 2G) * H, D], in the order of ``rank_layout``.
            bias: as many, or None.
        """
        linears = [self.linear_q, self.linear_kv] if self.partition.replicates_kv else [self.linear_qkv]
        widths = [linear.weight.shape[0] for linear in linears]
        for linear, rows in zip(linears, weight.split(widths), strict=True):
            linear.weight.copy_(rows)
        if bias is not None:
            for linear, rows in zip(linears, bias.split(widths), strict=True):
                linear.bias.copy_(rows)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's distributed checkpoint of this layer, the same for every tensor-parallel size."""
        return sharded_heads(self, prefix, sharded_offsets, metadata)


class RecomputedCoreAttention(CoreAttention):
    """Runs again in the backward pass instead of keeping what it computed."""

    def forward(self, *inputs: Tensor | None) -> Tensor:
        if not self.training:
            return super().forward(*inputs)
        return tensor_parallel.checkpoint(super().forward, False, *inputs)


def document_starts(packed: PackedSeqParams, seq_len: int, device: torch.device) -> Tensor:
    """Where the document of each of ``seq_len`` packed positions begins, [S] int64.

    Raises:
        UserError: the documents are not simply one after the other.
    """
    if packed.qkv_format != "thd" or packed.cu_seqlens_q is None or packed.cu_seqlens_q_padded is not None:
        raise UserError(
            f"packed_seq_params.qkv_format ({packed.qkv_format}) must be 'thd' with cu_seqlens_q and without padding: "
            "documents stand one after the other in one row. Pack them without gaps."
        )
    bounds = packed.cu_seqlens_q.to(device=device, dtype=torch.int64)
    document_S = torch.searchsorted(bounds, torch.arange(seq_len, device=device), right=True) - 1
    return bounds[document_S]


def _rank_rng() -> contextlib.AbstractContextManager:
    return tensor_parallel.get_cuda_rng_tracker().fork()


def _left_to_draw_weights(weight: Tensor) -> Tensor:
    return weight
