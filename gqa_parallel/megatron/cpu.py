"""What Megatron-Core needs to run without CUDA. Importing ``gqa_parallel.megatron`` applies it where CUDA is absent."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random


class CPURNGStatesTracker(random.CudaRNGStatesTracker):
    """Megatron's named random states, kept of the CPU's generator."""

    def add(self, name: str, seed: int) -> None:
        if name in self.states_:
            raise ValueError(f"random state {name} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"random state {name} is not set: call model_parallel_cuda_manual_seed first")
        if self._current_state_name == name:  # nested: draw on from the same stream
            yield
            return
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            self._current_state_name = outer_name
            torch.set_rng_state(outer_state)


def causal_mask(sequence_length: int) -> torch.Tensor:
    """True where attention is masked, [S, S]."""
    return torch.ones(sequence_length, sequence_length, dtype=torch.bool).triu(1)


def run_megatron_without_cuda() -> None:
    """Point Megatron-Core's CUDA calls at the CPU. Does nothing where CUDA is present, or when done already."""
    if torch.cuda.is_available() or isinstance(random._CUDA_RNG_STATE_TRACKER, CPURNGStatesTracker):
        return
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random._CUDA_RNG_STATE_TRACKER = CPURNGStatesTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    fused_softmax.get_default_causal_mask = causal_mask
