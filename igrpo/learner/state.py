"""What a run goes on from: weights, optimiser, schedule, random numbers, the place in the data. Nothing is unpickled
that could be code: weights are safetensors, the rest is read with ``weights_only``, which knows tensors and plain data.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from igrpo.settings import ConfigError

logger = logging.getLogger(__name__)

SCHEDULER, LOOP = "scheduler.bin", "loop.pt"
_OLDER_SCHEDULER = "custom_checkpoint_0.pkl"
_NUMPY = [type(numpy.dtype("uint32")), numpy.dtype, numpy.ndarray, numpy.empty(0).__reduce__()[0]]
"""What numpy's random state is made of."""


def save_loop(scheduler: Any, extra: Any, folder: Path) -> None:
    torch.save(scheduler.state_dict(), folder / SCHEDULER)
    torch.save(extra, folder / LOOP)


def load_loop(scheduler: Any, folder: Path, trust: bool) -> Any:
    """The ``extra`` of ``save_loop``."""
    older = folder / _OLDER_SCHEDULER
    scheduler.load_state_dict(read(folder / SCHEDULER if not older.is_file() else older, trust))
    return read(folder / LOOP, trust)


def save_random_numbers(folder: Path, rank: int) -> None:
    """Of this process. Names are those of accelerate, which older checkpoints were written by."""
    state = {
        "random_state": random.getstate(),
        "numpy_random_seed": numpy.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    torch.save(state, _random_numbers(folder, rank))


def load_random_numbers(folder: Path, rank: int, trust: bool) -> None:
    processes = len(list(folder.glob(_random_numbers(folder, "*").name)))  # those that wrote the checkpoint
    if rank >= processes > 0:
        logger.warning("%s was written by %d processes: this one begins with random numbers of its own",
                       folder.parent, processes)  # fmt: skip
        return
    state = read(_random_numbers(folder, rank), trust)
    random.setstate(state["random_state"])
    numpy.random.set_state(state["numpy_random_seed"])
    torch.set_rng_state(state["torch_manual_seed"])
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in state:
        torch.cuda.set_rng_state_all(state["torch_cuda_manual_seed"])


def read(path: Path, trust: bool, harmless: Sequence[Any] = ()) -> Any:
    """A file of ``torch.save``.

    Args:
        harmless: classes that it may hold as well.

    Raises:
        ConfigError: it holds more than tensors and plain data, and nobody said that it can be trusted.
    """
    try:
        with torch.serialization.safe_globals([*_NUMPY, *harmless]):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"resume_from_checkpoint: {path} is damaged, or holds objects whose loading may run code; only if you "
            "trust whoever wrote it, write trust_checkpoint: true"
        ) from error


def _random_numbers(folder: Path, rank: int | str) -> Path:
    return folder / f"random_states_{rank}.pkl"
