"""Reward functions that misbehave when a completion holds the word "bad"; named ``tests.loop.bad_rewards:NAME``."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import sys
import threading
import time


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")

    def __str__(self) -> str:
        raise RuntimeError("cannot be printed")


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def raises(completions, **_):
    if any("bad" in completion for completion in completions):
        raise KeyError("no such thing")
    return length(completions)


def raises_unpicklable(completions, **_):
    if any("bad" in completion for completion in completions):
        raise UnpicklableError(1, 2)
    return length(completions)


def sleeps(completions, **_):
    if any("bad" in completion for completion in completions):
        time.sleep(600)
    return length(completions)


def holds_the_lock(completions, **_):
    """A loop in C that never lets go of the interpreter lock: no Python signal handler runs."""
    if any("bad" in completion for completion in completions):
        re.fullmatch(r"(a*)*b", "a" * 40)
    return length(completions)


def exits(completions, **_):
    if any("bad" in completion for completion in completions):
        sys.exit("leaving")
    return length(completions)


def kills_itself(completions, **_):
    if any("bad" in completion for completion in completions):
        os._exit(3)
    return length(completions)


def exits_with_zero(completions, **_):
    if any("bad" in completion for completion in completions):
        os._exit(0)
    return length(completions)


def segfaults(completions, **_):
    if any("bad" in completion for completion in completions):
        ctypes.string_at(0)
    return length(completions)


def dies_later(completions, **_):
    """Answers, and takes its worker down when that is idle."""
    if any("bad" in completion for completion in completions):
        threading.Timer(0.2, os._exit, (5,)).start()
    return length(completions)


def takes_its_time(completions, **_):
    """Long enough to be killed meanwhile; tells its process to who asks."""
    if completions == ["pid"]:
        return [float(os.getpid())]
    time.sleep(0.8)
    return length(completions)


def short_list(completions, **_):
    return length(completions)[1:]


def none_instead_of_list(completions, **_):
    return None


def odd_scores(completions, **_):
    scores = {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "true": True, "int": 3}
    return [scores.get(completion, 0.5) for completion in completions]


def numpy_scores(completions, **_):
    import numpy

    return numpy.asarray([len(completion) for completion in completions], dtype=numpy.float32)


async def awaited(completions, **_):
    await asyncio.sleep(0.01)
    return length(completions)


def names_few_arguments(completions, level):
    return [float(number) for number in level]


def seen(prompts, completions, completion_ids, solution, level, **columns):
    """Scores 1.0 when called as TRL calls a reward function with a conversation."""
    good = (
        prompts == [[{"role": "user", "content": "2 + 2?"}]] * 2
        and completions == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "bc"}]]
        and completion_ids == [[1], [2, 3]]
        and (solution, level) == (["4", "4"], [7, 7])
        and columns == {"source": ["made up"] * 2}
    )
    return [float(good)] * 2


def worker_modules(completions, **_):
    heavy = {"torch", "transformers", "vllm", "accelerate", "pytest"}
    return [float(len(heavy & set(sys.modules)))] * len(completions)


def worker_threads(completions, **_):
    return [float(os.environ["OMP_NUM_THREADS"]) + float(os.environ["MKL_NUM_THREADS"])] * len(completions)


def worker_pid(completions, **_):
    return [float(os.getpid())] * len(completions)


def ignores_interrupt(completions, **_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return length(completions)
