"""What an engine has learned, as parts of full tensors, out of it and into it, at every ZeRO stage.

Of each parameter that is its fp32 value and AdamW's two moments. Between them the data-parallel ranks hold a
parameter of a tensor-parallel rank as flat ranges; each rank of them collects some parameters and writes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gqa_parallel.checkpoint.native import NativeCheckpoint, Part
from gqa_parallel.deepspeed.engine import DeepSpeedEngine
from gqa_parallel.megatron.parameters import Sharding, full_parameters

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The range of a flattened parameter that this rank's optimizer updates.

    Args:
        start: of the range.
        tensors: fp32 views of the optimizer's own memory, by kind (``weight``, ``exp_avg``, ``exp_avg_sq``).
    """

    start: int
    tensors: Mapping[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.tensors[WEIGHT].numel()


def take_parts(engine: DeepSpeedEngine) -> list[Part]:
    """A copy on the CPU of what this rank shall write: over all ranks, each full tensor once.

    Communication: over data parallelism each parameter and moment is reduced to its writer (stage 0: none).
    """
    tp_group, dp_group = engine.mpu.get_tensor_model_parallel_group(), engine.mpu.get_data_parallel_group()
    load = [0] * dp_group.size()
    parts = []
    for _, parameter, sharding in full_parameters(engine.module, tp_group.size()):
        owned = sharding.owned(tp_group.rank())
        if not owned:
            continue
        writer = load.index(min(load))
        shape = sharding.local_shape(tp_group.rank())
        load[writer] += torch.Size(shape).numel()
        fragment = _fragment(engine, parameter)
        for kind in (WEIGHT, *MOMENTS):
            part = _collect(engine, fragment, kind, shape, writer)
            if part is not None:
                parts += _owned_parts(f"{kind}/{sharding.name}", part, sharding, tp_group.rank())
    return parts


@torch.no_grad()
def put_state(engine: DeepSpeedEngine, checkpoint: NativeCheckpoint, optimizer_steps: int) -> None:
    """Continue from a checkpoint of the same model; every rank reads only what its optimizer holds.

    Args:
        engine: has not trained.
        checkpoint: verified.
        optimizer_steps: updates that the optimizer has done.
    Raises:
        DamagedCheckpoint: on the rank that finds a tensor missing or of another shape or dtype.
    """
    rank = engine.mpu.get_tensor_model_parallel_rank()
    for _, parameter, sharding in full_parameters(engine.module, engine.mpu.get_tensor_model_parallel_world_size()):
        fragment = _fragment(engine, parameter)
        if fragment is None:
            continue
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(_read(checkpoint, kind, sharding, rank, fragment))
    for state in _optimizer(engine).state.values():
        state["step"].fill_(optimizer_steps)


@torch.no_grad()
def publish(engine: DeepSpeedEngine) -> None:
    """Compute with the fp32 values that ``put_state`` has set.

    Communication: ZeRO 1 and 2 gather all parameters, ZeRO 3 its persistent ones.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()


def optimizer_steps(engine: DeepSpeedEngine) -> int:
    """Updates that the optimizer has done."""
    steps = {int(state["step"]) for state in _optimizer(engine).state.values() if "step" in state}
    return max(steps, default=0)


def loss_scale(engine: DeepSpeedEngine) -> dict[str, float]:
    """The state of fp16's loss scaler; empty with other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not engine.fp16_enabled():
        return {}
    return {name: value for name, value in vars(scaler).items() if isinstance(value, (int, float))}


def set_loss_scale(engine: DeepSpeedEngine, values: Mapping[str, float]) -> None:
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(values)


def _optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """torch's, inside DeepSpeed's where there is one."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.basic_optimizer


def _fragment(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Fragment | None:
    """This rank's range of a parameter; None: it has none."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        tensors = _state(engine, parameter)
        return Fragment(0, {kind: tensor.view(-1) for kind, tensor in tensors.items()})
    if stage == 3:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = size * engine.mpu.get_data_parallel_rank()
        size = min(size, parameter.ds_numel - start)  # the last partitions end in padding, or are all padding
        if size <= 0:
            return None
        flat = zero.fp32_partitioned_groups_flat[group]
    else:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        start, offset, size = (
            mapping.lp_fragment_address.start,
            mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
        )
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return Fragment(start, {kind: t.narrow(0, offset, size) for kind, t in _state(engine, flat).items()})


def _state(engine: DeepSpeedEngine, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of one of its parameters, made as AdamW does where it has not stepped yet."""
    optimizer = _optimizer(engine)
    state = optimizer.state[parameter]
    if "step" not in state:
        on_device = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {WEIGHT: parameter.data, **{moment: state[moment] for moment in MOMENTS}}


def _collect(
    engine: DeepSpeedEngine, fragment: Fragment | None, kind: str, shape: tuple[int, ...], writer: int
) -> Tensor | None:
    """A whole parameter of this tensor-parallel rank, a copy on the CPU of ``writer``; None on the others."""
    dp_group = engine.mpu.get_data_parallel_group()
    writes = dp_group.rank() == writer
    if engine.zero_optimization_stage() == 0 or dp_group.size() == 1:
        return fragment.tensors[kind].view(shape).to("cpu", copy=True) if writes else None
    # each element comes from one rank; a sum of integers keeps its bits, even those of -0.0
    whole = torch.zeros(torch.Size(shape).numel(), dtype=torch.int32, device=engine.device)
    if fragment is not None:
        whole[fragment.start : fragment.stop] = fragment.tensors[kind].view(torch.int32)
    dist.reduce(whole, group=dp_group, group_dst=writer)
    return whole.view(torch.float32).view(shape).cpu() if writes else None


def _owned_parts(name: str, part: Tensor, sharding: Sharding, rank: int) -> Iterator[Part]:
    owned, offset = sharding.owned(rank), 0
    for piece in sharding.pieces[rank]:
        if piece in owned:
            data = part.narrow(sharding.dim, offset, len(piece))
            yield Part(name, sharding.shape, sharding.dim, piece.start, data)
        offset += len(piece)


def _read(checkpoint: NativeCheckpoint, kind: str, sharding: Sharding, rank: int, fragment: Fragment) -> Tensor:
    """The fragment, read with no more than the rows that it touches; what is padding is zero."""
    shape = sharding.local_shape(rank)
    row_size = torch.Size(shape[1:]).numel()
    rows = range(fragment.start // row_size, -(-fragment.stop // row_size))
    out, offset = torch.zeros((len(rows), *shape[1:])), 0
    for piece in sharding.pieces[rank]:
        block = [range(size) for size in sharding.shape]
        if sharding.dim == 0:
            first, last = max(rows.start, offset), min(rows.stop, offset + len(piece))
            place = out[first - rows.start : max(first, last) - rows.start]
            block[0] = range(piece.start + first - offset, piece.start + last - offset)
        else:
            place = out.narrow(sharding.dim, offset, len(piece))
            block[0], block[sharding.dim] = rows, piece
        if place.numel():
            place.copy_(checkpoint.read(f"{kind}/{sharding.name}", block, sharding.shape, torch.float32))
        offset += len(piece)
    first = fragment.start - rows.start * row_size
    return out.view(-1)[first : first + fragment.stop - fragment.start]
