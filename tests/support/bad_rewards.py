"""Reward functions that misbehave when a completion holds the word "bad"; named ``tests.support.bad_rewards:NAME``."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import ctypes
import locale
import multiprocessing
import os
import re
import resource
import signal
import subprocess
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


# --- what a call leaves behind

KEPT = []


def starts_processes(completions, **_):
    """A child, a grandchild in a session of its own that nobody waits for, a shell's background job that ignores
    signals, and one of multiprocessing."""
    if any("bad" in completion for completion in completions):
        subprocess.Popen(["sleep", "600"])
        subprocess.Popen("trap '' TERM INT HUP; (sleep 600 & sleep 600) & exit 0", shell=True, start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    return length(completions)


def starts_processes_and_hangs(completions, **_):
    starts_processes(completions)
    return sleeps(completions)


def starts_processes_and_dies(completions, **_):
    starts_processes(completions)
    return kills_itself(completions)


def forges_replies(completions, **_):
    """Writes into every open socket before it returns."""
    if any("bad" in completion for completion in completions):
        kind = completions[0].split()[-1]
        text = {"bad": b"nonsense", "deep": b"[" * 100_000, "short": b'[1, "x"]', "other": b"[1, [{}], null]"}[kind]
        for number in range(3, 100):
            with contextlib.suppress(OSError):
                os.write(number, len(text).to_bytes(4, "big") + text)
    return length(completions)


def kills_its_parent(completions, **_):
    starts_processes(completions)
    if any("bad" in completion for completion in completions):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    return length(completions)


def forks_and_returns(completions, **_):
    """Each process comes back to the worker's code and would answer, too."""
    if any("bad" in completion for completion in completions):
        for _ in range(3):
            os.fork()
    return length(completions)


def leaks_files(completions, **_):
    KEPT.append([open(os.devnull) for _ in range(100)])  # noqa: SIM115
    return length(completions)


def leaks_threads(completions, **_):
    for _ in range(30):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return length(completions)


def takes_memory(completions, **_):
    if any("bad" in completion for completion in completions):
        KEPT.append(b"x" * (400 * 2**20))
        time.sleep(600)
    return length(completions)


def takes_memory_in_a_child(completions, **_):
    if any("bad" in completion for completion in completions):
        subprocess.run([sys.executable, "-c", "import time; x = b'x' * (400 * 2**20); time.sleep(600)"])
    return length(completions)


def keeps_memory(completions, **_):
    if any("bad" in completion for completion in completions):
        KEPT.append(b"x" * (150 * 2**20))
    return length(completions)


def hoards(completions, **_):
    """Keeps 1.1 GiB of its first call."""
    if not KEPT:
        KEPT.append(b"x" * (1150 * 2**20))
    return length(completions)


def prints(completions, **_):
    if any("bad" in completion for completion in completions):
        for _ in range(50_000):
            print("\x1b[2Jscreen gone\rstep 9/9 reward 1.0 \u202e" * 3)
        subprocess.run(["echo", "from a child"])
    return length(completions)


def prints_little(completions, **_):
    print("hello")
    return length(completions)


def raises_controls(completions, **_):
    raise ValueError("\x1b]0;title\x07\rstep 9/9\n\u202e\ud800" + "x" * 100_000)


def lowers_its_limits(completions, **_):
    if any("bad" in completion for completion in completions):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    else:
        open(os.devnull).close()
    return length(completions)


def spoils_its_module(completions, **_):
    if KEPT:
        raise TypeError("spoilt by an earlier call")
    if any("bad" in completion for completion in completions):
        KEPT.append(None)
    return length(completions)


def closes_its_output(completions, **_):
    if any("bad" in completion for completion in completions):
        sys.stdout.close()
        os.close(2)
    return length(completions)


def closes_everything(completions, **_):
    if any("bad" in completion for completion in completions):
        os.closerange(0, 100)
    return length(completions)


def replaces_builtins(completions, **_):
    if any("bad" in completion for completion in completions):
        builtins.open = None
        builtins.id = None
    else:
        open(os.devnull).close()
    return length(completions)


def changes_its_process(completions, **_):
    """Everything that the next call would notice; it scores 1.0 while it notices nothing."""
    handlers = signal.SIGALRM, signal.SIGCHLD, signal.SIGINT
    now = (os.getcwd(), sys.getrecursionlimit(), [signal.getsignal(number) for number in handlers],
           locale.setlocale(locale.LC_ALL), signal.pthread_sigmask(signal.SIG_BLOCK, ()), sys.stdout)  # fmt: skip
    if not KEPT:
        KEPT.append(now)
    os.chdir("/")
    sys.setrecursionlimit(200)
    for number in handlers:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGCHLD else signal.SIG_DFL)
    signal.alarm(1)
    locale.setlocale(locale.LC_ALL, "C.UTF-8" if now[3] == "C" else "C")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    sys.stdout = None
    return [float(now == KEPT[0])] * len(completions)


def recurses(completions, **_):
    if any("bad" in completion for completion in completions):
        recurses(completions)
    return length(completions)


def pauses(completions, **_):
    if any("bad" in completion for completion in completions):
        signal.pause()
    return length(completions)


def odd_returns(completions, **_):
    """An endless iterator, numbers beyond floats, and what cannot be sent to another process."""
    text = completions[0]
    if text == "bad endless":
        return iter(int, 1)
    return {"bad huge": [10**5000], "bad lambda": [lambda: 1], "bad list": [0.5] * 10**6}.get(text, length(completions))


def variables(completions, **_):
    """How many of the words in a completion are set in the environment."""
    return [float(sum(word in os.environ for word in completion.split())) for completion in completions]
