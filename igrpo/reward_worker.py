"""What runs inside a reward worker, and how one is spawned.

Spawning normally runs the main script again in every child. Here it does not, so that a worker costs the import of this
module and of the reward functions, whatever the main script imports or does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import math
import os
import pickle
import signal
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from multiprocessing import popen_spawn_posix, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from igrpo.rewards import BUILTIN, RewardFunction

Outcome = list[float | str | None] | str
"""What a worker answers: per completion a score or what is wrong with it; a bare string if the whole call failed."""


def _without_main(name: str) -> dict[str, Any]:
    data = spawn.get_preparation_data(name)
    return {key: value for key, value in data.items() if key not in ("init_main_from_name", "init_main_from_path")}


class _LightPopen(popen_spawn_posix.Popen):
    # The standard launcher, but its ``spawn.get_preparation_data`` does not name the main script. Rebinding that one
    # name for this copy of the function leaves every other user of multiprocessing alone.
    _launch = types.FunctionType(
        popen_spawn_posix.Popen._launch.__code__,
        {
            **vars(popen_spawn_posix),
            "spawn": types.SimpleNamespace(**{**vars(spawn), "get_preparation_data": _without_main}),
        },
    )


class _LightSpawnProcess(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: SpawnProcess) -> _LightPopen:
        return _LightPopen(process_obj)


class LightSpawnContext(SpawnContext):
    Process = _LightSpawnProcess


def start_worker(parent: int, functions: Sequence[RewardFunction]) -> None:
    """Runs once in every worker. It must not raise, or the worker would be replaced for ever."""
    # pebble's own handler runs in Python and waits for a lock that a loop in C does not give back.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    for function in functions:
        with contextlib.suppress(BaseException):  # a failing import is reported by the call that needs it
            loaded = function.load()
            if function.path == BUILTIN["accuracy"]:
                loaded([r"\boxed{2x}"], [r"x+x"])  # loads the formula parser outside any deadline


def _die_with(parent: int) -> None:
    """Make the kernel kill this worker when its parent dies, even in the middle of a call."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def call_function(function: RewardFunction, payload: bytes) -> Outcome:
    """Runs in a worker. Only plain data goes back: an exception that cannot be unpickled would break the pool."""
    try:
        arguments = pickle.loads(payload)
        count = len(arguments["completions"])
        loaded = function.load()
        scores = loaded(**_accepted(loaded, arguments))
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores))
        scores = scores if isinstance(scores, str | Mapping) or scores is None else list(scores)
        if not isinstance(scores, list):
            return f"it returned {type(scores).__name__}, not a list of numbers"
        if len(scores) != count:
            return f"it returned {len(scores)} scores for {count} completions"
        return [_checked(score) for score in scores]
    except BaseException as error:  # SystemExit and KeyboardInterrupt included
        return _described(error)


def _described(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    try:
        text = str(error)
    except Exception as unprintable:
        text = f"<{type(unprintable).__name__} while printing it>"
    return f"{type(error).__name__}: {text} ({os.path.basename(place.filename)}:{place.lineno})"[:1000]


async def _awaited(scores: Any) -> Any:
    return await scores


def _accepted(function: Any, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """All arguments for a function with ``**kwargs``, else the ones it names; ``prompt_suffix``, which TRL does not
    pass, only where it is named."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return named
    return {name: values for name, values in arguments.items() if name != "prompt_suffix"} | named


def _checked(score: Any) -> float | str | None:
    if hasattr(score, "item"):  # NumPy and torch scalars
        score = score.item()
    if score is None:
        return None
    if not isinstance(score, int | float):
        return f"it returned {type(score).__name__} {str(score)[:40]!r} as a score"
    return float(score) if math.isfinite(score) else f"it returned {score} as a score"
