"""What a model costs, computed from its sizes: parameters, FLOPs, KV cache, collectives, memory.

Counts of parameters, cache bytes and collective payloads are exact; activation memory is an estimate. A
figure of one rank takes that rank's heads from its ``HeadPartition``, so uneven shares and replicated KV
heads are counted as stored.
"""

from dataclasses import dataclass, fields
from math import lcm
from typing import Literal

from gqa_parallel.partition.heads import HeadPartition

FLOPS_PER_MULTIPLY_ADD = 2
BACKWARD_AND_FORWARD = 3  # the backward of a matmul is two matmuls of its size


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that its cost follows from.

    Args:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer; divides ``num_heads``.
        head_dim: width of one head.
        ffn_hidden_size: width of the MLP.
        vocab_size: rows of the embedding as stored, padding included (``padded_vocab_size``).
        gated_mlp: a gate beside the up projection (SwiGLU, arXiv:2002.05202): three matrices instead of two.
        qkv_bias: bias of the QKV projection.
        linear_bias: bias of every linear layer but the output layer, QKV included.
        qk_norm: a norm over ``head_dim`` on queries and on keys.
        layernorm_bias: norms have a bias (LayerNorm); RMSNorm has none.
        tie_embeddings: the output layer is the embedding.
        output_gate: a gate per query head, projected like the queries.
        sinks: a learned logit per query head.
        post_norms: norms also on the outputs of attention and MLP.
        window: keys that a query of a local layer sees; None: there are no local layers.
        global_every: every so many-th layer sees all keys; None: with a window, none does.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    gated_mlp: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    layernorm_bias: bool = False
    tie_embeddings: bool = False
    output_gate: bool = False
    sinks: bool = False
    post_norms: bool = False
    window: int | None = None
    global_every: int | None = None

    @property
    def num_local_layers(self) -> int:
        """Layers with a window."""
        if self.window is None:
            return 0
        return self.num_layers - (self.num_layers // self.global_every if self.global_every else 0)

    def partition(self, tp_size: int = 1) -> HeadPartition:
        """The heads of each of ``tp_size`` ranks."""
        return HeadPartition(self.num_heads, self.num_kv_heads, tp_size)

    @property
    def mlp_inputs(self) -> int:
        """Matrices that read the MLP's input: up, and gate where there is one."""
        return 2 if self.gated_mlp else 1

    @property
    def parameters_per_norm_channel(self) -> int:
        """A weight, and a bias for LayerNorm."""
        return 2 if self.layernorm_bias else 1


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of ``lcm(128, tp_size)`` that holds the vocabulary.

    Rows in 128s fill the tiles of a matrix unit, and are the same for every ``tp_size`` that divides 128.
    """
    multiple = lcm(128, tp_size)
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, or of one rank, by part."""

    embedding: int
    attention: int  # QKV and output projections, sinks
    mlp: int
    norms: int  # QK-norm and the final norm included
    output: int  # 0 where tied to the embedding

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def parameter_counts(shape: ModelShape, partition: HeadPartition | None = None, rank: int = 0) -> ParameterCounts:
    """Parameters that one tensor-parallel rank stores, replicas included.

    Args:
        shape: the model.
        partition: the heads of the ranks; None: one rank, that is, the whole model.
        rank: the tensor-parallel rank.
    """
    partition = partition or shape.partition()
    hidden, tp_size = shape.hidden_size, partition.tp_size
    query_heads = len(partition.query_heads(rank))
    q_width = query_heads * shape.head_dim
    qkv_width = (2 if shape.output_gate else 1) * q_width + 2 * len(partition.kv_heads(rank)) * shape.head_dim
    ffn_width = shape.ffn_hidden_size // tp_size

    attention = qkv_width * hidden + hidden * q_width + (query_heads if shape.sinks else 0)
    mlp = shape.mlp_inputs * ffn_width * hidden + hidden * ffn_width
    if shape.qkv_bias or shape.linear_bias:
        attention += qkv_width
    if shape.linear_bias:  # a row-parallel layer adds its bias after the sum, so each rank holds it whole
        attention += hidden
        mlp += shape.mlp_inputs * ffn_width + hidden
    norm_channels = (4 if shape.post_norms else 2) * hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    embedding = shape.vocab_size // tp_size * hidden
    return ParameterCounts(
        embedding=embedding,
        attention=shape.num_layers * attention,
        mlp=shape.num_layers * mlp,
        norms=shape.parameters_per_norm_channel * (shape.num_layers * norm_channels + hidden),
        output=0 if shape.tie_embeddings else embedding,
    )


def fullest_rank(shape: ModelShape, partition: HeadPartition) -> int:
    """The first of the tensor-parallel ranks that store the most parameters."""
    return max(range(partition.tp_size), key=lambda rank: parameter_counts(shape, partition, rank).total)


def model_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """FLOPs that training one token needs, for TFLOP/s and MFU (arXiv:2204.02311, appendix B).

    ``3 * (2 * weights + 4 * keys * num_heads * head_dim * num_layers)``: a forward, and a backward of twice its
    size. ``weights`` are those of matrices that the token is multiplied with: no embedding lookup, no biases, no
    norms. ``QK^T`` and ``AV`` take ``2 * keys * num_heads * head_dim`` each, for the keys that a token sees on
    average: half the sequence (appendix B counts all of it), in layers with a window ``w`` only
    ``w * (1 - w / (2 * seq_len))``. Recomputation is not counted. The number of KV heads changes the weights, not the
    scores.

    Args:
        shape: the model.
        seq_len: tokens of a sequence.

    Returns:
        FLOPs of one token, forward and backward, over all ranks together.
    """
    q_width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    attention_weights = shape.hidden_size * ((3 if shape.output_gate else 2) * q_width + 2 * kv_width)
    mlp_weights = (shape.mlp_inputs + 1) * shape.hidden_size * shape.ffn_hidden_size
    weights = shape.num_layers * (attention_weights + mlp_weights) + shape.hidden_size * shape.vocab_size
    # twice the mean number of keys, so that it stays whole
    keys = seq_len * (shape.num_layers - shape.num_local_layers)
    if shape.num_local_layers:
        window = min(shape.window, seq_len)
        keys += round(shape.num_local_layers * (2 * window - window * window / seq_len))
    scores = keys * q_width  # QK^T and AV, in multiply-adds
    return BACKWARD_AND_FORWARD * FLOPS_PER_MULTIPLY_ADD * (weights + scores)


def kv_cache_bytes_per_token(
    shape: ModelShape, partition: HeadPartition | None = None, rank: int = 0, bytes_per_element: int = 2
) -> int:
    """Bytes of the keys and values of one token in all layers (arXiv:2305.13245).

    Args:
        shape: the model.
        partition: the heads of the ranks; None: the whole model.
        rank: the tensor-parallel rank, whose replicas are counted.
        bytes_per_element: 2 for bf16 and fp16, 4 for fp32.
    """
    partition = partition or shape.partition()
    return 2 * shape.num_layers * len(partition.kv_heads(rank)) * shape.head_dim * bytes_per_element


@dataclass(frozen=True)
class Collective:
    """One collective of a layer.

    Args:
        part: the half of the layer that it belongs to.
        phase: when it runs.
        operation: what it does.
        tensor: what travels.
        num_elements: elements of the whole tensor: reduced, gathered, or reduced before it is scattered.
        num_ranks: ranks that take part.
    """

    part: Literal["attention", "mlp"]
    phase: Literal["forward", "backward"]
    operation: Literal["all-reduce", "all-gather", "reduce-scatter"]
    tensor: str
    num_elements: int
    num_ranks: int

    @property
    def sent_elements(self) -> float:
        """Elements that a rank sends in a ring: an all-reduce is a reduce-scatter and an all-gather."""
        passes = 2 if self.operation == "all-reduce" else 1
        return passes * (self.num_ranks - 1) / self.num_ranks * self.num_elements


def layer_collectives(
    shape: ModelShape, partition: HeadPartition, num_tokens: int, sequence_parallel: bool
) -> list[Collective]:
    """Tensor-parallel collectives of one layer and micro-batch, forward and backward, in order of part.

    Without sequence parallelism, attention and MLP each all-reduce their output and their input's gradient
    (arXiv:1909.08053, section 3). With it (arXiv:2205.05198, section 4.2.2) each all-gathers its input and
    reduce-scatters its output, and does the reverse in backward. Megatron's fused column-parallel linear
    keeps its shard of the input only and gathers it again for the weight gradient; attention with replicated
    KV heads keeps the gathered input.

    Parameters that ranks share add sums of weight gradients: KV projections over their replicas, QK-norms
    over all ranks, and under sequence parallelism the norms and biases of the residual stream.

    Args:
        shape: the model.
        partition: the heads of the ranks.
        num_tokens: tokens of a micro-batch, ``micro_batch_size * seq_len``.
        sequence_parallel: activations outside attention and MLP are sharded along the sequence.

    Returns:
        What the rank with the most replicas takes part in; empty for one rank.
    """
    if partition.tp_size == 1:
        return []
    return [
        collective
        for part, gathers_once in (("attention", partition.replicates_kv), ("mlp", False))
        for collective in (
            *_of_activations(part, shape, partition, num_tokens, sequence_parallel, gathers_once),
            *_of_weight_gradients(part, shape, partition, sequence_parallel),
        )
    ]


def _of_activations(part, shape, partition, num_tokens, sequence_parallel, gathers_once) -> list[Collective]:
    def collective(phase, operation, tensor) -> Collective:
        return Collective(part, phase, operation, tensor, num_tokens * shape.hidden_size, partition.tp_size)

    if not sequence_parallel:
        return [
            collective("forward", "all-reduce", "output"),
            collective("backward", "all-reduce", "input gradient"),
        ]
    return [
        collective("forward", "all-gather", "input"),
        collective("forward", "reduce-scatter", "output"),
        collective("backward", "all-gather", "output gradient"),
        *([] if gathers_once else [collective("backward", "all-gather", "input, again")]),
        collective("backward", "reduce-scatter", "input gradient"),
    ]


def _of_weight_gradients(part, shape, partition, sequence_parallel) -> list[Collective]:
    def gradient_sum(tensor, num_elements, num_ranks=partition.tp_size) -> Collective:
        return Collective(part, "backward", "all-reduce", f"{tensor} gradient", num_elements, num_ranks)

    sums = []
    if part == "attention" and partition.replicates_kv:
        rows = 2 * shape.head_dim  # one K head and one V head
        columns = shape.hidden_size + (shape.qkv_bias or shape.linear_bias)
        replicas = max(len(partition.kv_replica_ranks(rank)) for rank in range(partition.tp_size))
        sums.append(gradient_sum("KV weight", rows * columns, replicas))
    if part == "attention" and shape.qk_norm:
        sums.append(gradient_sum("QK-norm", 2 * shape.head_dim * shape.parameters_per_norm_channel))
    if sequence_parallel:  # each rank has seen its part of the sequence only
        per_channel = shape.parameters_per_norm_channel + shape.linear_bias
        name = "norm and bias" if shape.linear_bias else "norm"
        sums.append(gradient_sum(name, per_channel * shape.hidden_size))
    return sums


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def rank_memory(
    shape: ModelShape,
    partition: HeadPartition,
    *,
    dp_size: int,
    zero_stage: int,
    mixed_precision: bool,
    num_tokens: int,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> RankMemory:
    """Bytes of training with AdamW on the fullest tensor-parallel rank.

    Bytes per parameter, of parameter + gradient + optimizer state (ZeRO, arXiv:1910.02054, section 3.1):

    * mixed precision: 2 + 2 + 12; the state is an fp32 master copy and two fp32 moments;
    * fp32: 4 + 4 + 8; the state is two moments.

    Stage 1 divides the optimizer state by ``dp_size``, stage 2 the gradients too, stage 3 the parameters too
    (section 5). Not counted: what DeepSpeed holds for a moment (communication buckets, the layer that stage 3
    has gathered, the fp32 copy of the gradient shard during the step), the allocator's reserve.

    Args:
        shape: the model.
        partition: the heads of the ranks.
        dp_size: data-parallel ranks, which ZeRO shards over.
        zero_stage: 0 to 3.
        mixed_precision: bf16 or fp16 with fp32 master weights.
        num_tokens: tokens of a micro-batch.
        sequence_parallel: as in ``layer_collectives``.
        recompute: as in ``activation_bytes``.
    """
    rank = fullest_rank(shape, partition)
    count = parameter_counts(shape, partition, rank).total
    shard = -(-count // dp_size)
    parameter_bytes, gradient_bytes, optimizer_bytes = (2, 2, 12) if mixed_precision else (4, 4, 8)
    return RankMemory(
        parameters=parameter_bytes * (shard if zero_stage >= 3 else count),
        gradients=gradient_bytes * (shard if zero_stage >= 2 else count),
        optimizer=optimizer_bytes * (shard if zero_stage >= 1 else count),
        activations=activation_bytes(
            shape, partition, rank, num_tokens, sequence_parallel, recompute, 2 if mixed_precision else 4
        ),
    )


def activation_bytes(
    shape: ModelShape,
    partition: HeadPartition,
    rank: int,
    num_tokens: int,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
    bytes_per_element: int = 2,
) -> int:
    """Estimated bytes of what one micro-batch's forward keeps for its backward.

    Follows arXiv:2205.05198, section 4: equation 2, or equation 4 with sequence parallelism, with the rank's
    heads for ``h/t``, the MLP's own width for ``4h``, and no dropout masks. Norms and SwiGLU count as fused;
    unfused ones, as on the CPU, keep about half as much again. Attention scores (the ``5as/h`` term) are
    absent: SDPA recomputes them, so ``selective`` (recompute core attention) keeps as much as ``none``.
    ``full`` keeps the layers' inputs, and everything of the one layer that backward is recomputing. The loss
    keeps logits in fp32.

    Args:
        shape: the model.
        partition: the heads of the ranks.
        rank: the tensor-parallel rank.
        num_tokens: tokens of a micro-batch.
        sequence_parallel: the residual stream and its norms are sharded along the sequence.
        recompute: what backward computes again instead of keeping.
        bytes_per_element: of an activation.
    """
    tp_size = partition.tp_size
    local_heads, local_kv_heads = len(partition.query_heads(rank)), len(partition.kv_heads(rank))

    # elements per token
    stream = shape.hidden_size / (tp_size if sequence_parallel else 1)
    qkv_input = shape.hidden_size if partition.replicates_kv else stream  # gathered once, and kept
    q_and_k = (local_heads + local_kv_heads) * shape.head_dim
    v = local_kv_heads * shape.head_dim
    attention_output = local_heads * shape.head_dim
    before_qk_norm = q_and_k if shape.qk_norm else 0
    attention = stream + qkv_input + before_qk_norm + q_and_k + v + attention_output
    activation_function = (shape.mlp_inputs + 1) * shape.ffn_hidden_size / tp_size  # inputs and output
    layer = attention + stream + stream + activation_function

    if recompute == "full":
        layers = shape.num_layers * stream + layer
    else:
        layers = shape.num_layers * layer
    inputs_of_final_norm_and_output = 2 * stream
    logit_bytes = 4 * shape.vocab_size / tp_size
    return round(num_tokens * (bytes_per_element * (layers + inputs_of_final_norm_and_output) + logit_bytes))
