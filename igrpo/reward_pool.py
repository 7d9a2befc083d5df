"""Reward functions in worker processes, each call under a hard deadline.

A reward function reads text that a model made up, so it will one day loop for ever, raise, exhaust its stack or take
its process down. None of that reaches the training loop: a worker past its deadline is killed and replaced, a call that
failed for a batch is repeated one completion at a time, and only what fails alone gets ``reward_error_value``; whose
process dies, only the third time, since others may have killed it.

The judge is the exception: it waits for a network and runs no foreign code, so it has threads here and timeouts of its
own.

Workers are spawned, not forked: they inherit no CUDA context and no engine. Each is a pebble pool of its own with one
call in flight: pebble gives a whole pool up when a process dies at a bad moment, and no other call is lost with it.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from pebble import ProcessExpired, ProcessPool

from igrpo.reward_worker import LightSpawnContext, Outcome, call_function, start_worker
from igrpo.rewards import BUILTIN, RewardFunction
from igrpo.types import Completion, Message, Problem, Scored

if TYPE_CHECKING:
    from igrpo.judge import Judge

logger = logging.getLogger(__name__)

STALL_SECONDS = 120.0
"""A call without any outcome for this long beyond its deadline has lost its worker; imports count towards it."""
MAX_LOGGED = 20
"""Distinct error messages shown per reward function; the rest is only counted."""
ATTEMPTS = 3
"""How often a call may lose its worker before that is its own fault: an earlier call may be guilty, or whoever kills
processes on this machine."""


class _Lost(Exception):
    """The worker was gone before or while it ran the call."""


class _Died(_Lost):
    """It ended while it ran the call: one of its completions did that, or somebody killed it."""


@dataclass(eq=False)
class _Call:
    """One function on some of a problem's completions."""

    function: RewardFunction
    rows: tuple[int, ...]
    payload: bytes
    attempt: int = 1
    outcome: Outcome | TimeoutError | _Lost | None = None
    """None while it waits or runs."""

    @property
    def again(self) -> bool:
        """Whether it is worth repeating as it is: a guilty completion is found faster among single rows."""
        lost = isinstance(self.outcome, _Lost) and self.attempt < ATTEMPTS
        return lost and (len(self.rows) == 1 or not isinstance(self.outcome, _Died))


class _Worker:
    """One process, which pebble replaces when a call outlasts its deadline."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self.pool = ProcessPool(
            1, initializer=start_worker, initargs=(os.getpid(), tuple(functions)), context=LightSpawnContext()
        )
        self.call: _Call | None = None
        self.since = 0.0
        assert self.pool.active, "pebble starts its process when first asked"

    def stop(self) -> threading.Thread:
        """In the background: a broken pool may not let itself be joined."""
        self.pool.stop()
        thread = threading.Thread(target=self.pool.join, daemon=True)
        thread.start()
        return thread


class RewardPool:
    """Scores completions with several reward functions; use as a context manager or call ``close``.

    Example: ``with RewardPool(functions) as pool: scored = pool.submit(problem, completions, prompt).result()``

    Args:
        functions: What to call, from ``igrpo.rewards.load_reward_functions``.
        weights: One per function; 1.0 each by default.
        num_workers: Worker processes. One call runs in one worker: one function on one problem's completions.
        timeout: Seconds that one call may take.
        on_error: Score of a completion on which a function fails; None leaves the function out of its reward.
        judge: What the function of that name asks, as many completions at once as its configuration says.

    Raises:
        ValueError: No functions, two of one name, or not one weight each.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        num_workers: int = 1,
        timeout: float = 10.0,
        on_error: float | None = 0.0,
        judge: Judge | None = None,
    ) -> None:
        names = [function.name for function in functions]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"reward functions need distinct names and there must be one: {names}")
        if weights is not None and len(weights) != len(names):
            raise ValueError(f"{len(weights)} reward weights for {len(names)} functions: {', '.join(names)}")
        if num_workers < 1 or timeout <= 0:
            raise ValueError(f"num_workers ({num_workers}) must be at least 1 and timeout ({timeout}) positive")
        self.functions, self.timeout, self.on_error = tuple(functions), timeout, on_error
        self.weights = dict(zip(names, weights or [1.0] * len(names), strict=True))
        self._counts = {f"rewards/{name}/{kind}": 0.0 for name in names for kind in ("errors", "timeouts")}
        self._logged: dict[str, set[str]] = {name: set() for name in names}
        self._changed = threading.Condition(threading.RLock())  # guards the queue and the workers' calls
        self._queue: deque[_Call] = deque()
        self._closed = False
        self._local = tuple(function for function in functions if function.path != BUILTIN["judge"])
        self._workers = [_Worker(self._local) for _ in range(num_workers if self._local else 0)]
        self._judge, self._to_judge = judge, SimpleQueue[_Call]()
        for _ in range(judge.config.judge_max_concurrency if judge is not None else 0):
            threading.Thread(target=self._judge_calls, name="judge", daemon=True).start()

    def submit(
        self,
        problem: Problem,
        completions: Sequence[Completion],
        prompt: str | Sequence[Message],
        prompt_suffix: str = "",
    ) -> PendingScores:
        """Start scoring one problem's completions.

        Functions receive what TRL passes: ``prompts``, ``completions``, ``completion_ids``, ``solution`` and the row's
        columns, each repeated per completion; completions are messages when the prompt is a conversation. Beyond that
        ``prompt_suffix``, where it is named: the tags which the prompt already ends with. TRL's own functions see
        them before the text.

        Raises:
            ValueError: A column of the row cannot be sent to another process.
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        arguments = _arguments(problem, completions, prompt, prompt_suffix)
        _check_picklable(arguments, problem)
        return PendingScores(self, completions, arguments)

    def stats(self) -> dict[str, float]:
        """How many completions got ``on_error`` since the last call: ``rewards/<name>/errors`` and ``…/timeouts``."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return counts

    def close(self) -> None:
        """Stop the workers; unfinished scores are lost. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            for thread in [worker.stop() for worker in self._workers]:
                thread.join(timeout=10)
            if self._judge is not None:
                self._judge.close()  # what its daemon threads still ask for fails, and they die with the program

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enqueue(self, call: _Call) -> None:
        if call.function not in self._local:
            self._to_judge.put(call)
            return
        with self._changed:
            self._queue.append(call)
            self._dispatch()

    def _judge_calls(self) -> None:
        """A thread's life: one completion after the other."""
        while not self._closed:
            call = self._to_judge.get()
            outcome: list[float | str | None] | TimeoutError | str
            try:
                row = {name: values[0] for name, values in pickle.loads(call.payload).items()}
                outcome = [self._judge.score(row["prompts"], row["solution"], row["completions"])]  # type: ignore[union-attr]
            except TimeoutError as error:
                outcome = error
            except Exception as error:  # the thread must live on, whatever the client raises
                outcome = f"{type(error).__name__}: {error}"
            with self._changed:
                call.outcome = outcome
                self._changed.notify_all()

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.call is not None or not self._queue or self._closed:
                continue
            call = self._queue[0]
            try:
                future = worker.pool.schedule(call_function, args=(call.function, call.payload), timeout=self.timeout)
            except RuntimeError:  # died while idle: `_replace_dead_workers` sees to it
                continue
            self._queue.popleft()
            worker.call, worker.since = call, time.monotonic()
            future.add_done_callback(lambda done, worker=worker, call=call: self._finished(worker, call, done))

    def _finished(self, worker: _Worker, call: _Call, future: Future[Outcome]) -> None:
        """Runs in a thread of pebble's, so that the next call starts even while the main program is busy."""
        with self._changed:
            if worker.call is call:
                worker.call, call.outcome = None, _outcome(future, self.timeout)
                self._dispatch()
                self._changed.notify_all()

    def _replace_dead_workers(self) -> None:
        # Only ever in the caller's thread: the kernel kills a worker with the thread that started it (`start_worker`).
        for i, worker in enumerate(self._workers):
            stalled = worker.call is not None and time.monotonic() - worker.since > self.timeout + STALL_SECONDS
            if worker.pool.active and not stalled:
                continue
            logger.warning("a reward worker %s; it is replaced", "does not answer" if stalled else "died")
            worker.stop()
            if worker.call is not None and worker.call.outcome is None:
                worker.call.outcome = _Lost("its process is gone")
            worker.call = None
            self._workers[i] = _Worker(self._local)
        self._dispatch()

    def _count(self, function: RewardFunction, kind: Literal["errors", "timeouts"], message: str) -> float | None:
        self._counts[f"rewards/{function.name}/{kind}"] += 1
        logged = self._logged[function.name]
        if message not in logged and len(logged) < MAX_LOGGED:
            logged.add(message)
            last = "; its further messages are only counted" if len(logged) == MAX_LOGGED else ""
            given = "not scored" if self.on_error is None else f"scored {self.on_error}"
            logger.warning("reward function %s failed, completion %s: %s%s", function.name, given, message, last)
        return self.on_error


class PendingScores:
    """The scores of one ``submit``."""

    def __init__(self, pool: RewardPool, completions: Sequence[Completion], arguments: Mapping[str, list[Any]]) -> None:
        self._pool, self._completions, self._arguments = pool, tuple(completions), arguments
        self._scores: dict[str, list[float | None]] = {f.name: [None] * len(completions) for f in pool.functions}
        self._open: list[_Call] = []
        if completions:
            everything = tuple(range(len(completions)))
            for function in pool.functions:
                for rows in [everything] if function in pool._local else [(row,) for row in everything]:
                    self._call(function, rows)

    def done(self) -> bool:
        """Whether ``result`` returns at once. Asking is what repeats failed calls, so ask now and then."""
        if not self._open:
            return True
        if self._pool._closed:
            raise RuntimeError("the reward pool was closed before all scores were in")
        with self._pool._changed:
            self._pool._replace_dead_workers()
            finished = [call for call in self._open if call.outcome is not None]
            for call in finished:
                self._open.remove(call)
                self._take(call)
        return not self._open

    def result(self) -> tuple[Scored, ...]:
        """One Scored per completion, in order; waits for it."""
        with self._pool._changed:
            while not self.done():
                self._pool._changed.wait(timeout=1.0)
        return tuple(self._scored(i, completion) for i, completion in enumerate(self._completions))

    def _scored(self, i: int, completion: Completion) -> Scored:
        rewards = {name: scores[i] for name, scores in self._scores.items()}
        weights = self._pool.weights
        return Scored(completion, rewards, sum((weights[n] * r for n, r in rewards.items() if r is not None), 0.0))

    def _call(self, function: RewardFunction, rows: tuple[int, ...], attempt: int = 1) -> None:
        arguments = {name: [values[row] for row in rows] for name, values in self._arguments.items()}
        arguments = function.sees(arguments)
        call = _Call(function, rows, pickle.dumps(arguments), attempt)
        self._open.append(call)
        self._pool._enqueue(call)

    def _take(self, call: _Call) -> None:
        """Keep the scores of a call that succeeded; repeat one that failed, row by row; give up on a single row."""
        scores = self._scores[call.function.name]
        if isinstance(call.outcome, list):
            for row, score in zip(call.rows, call.outcome, strict=True):
                bad = isinstance(score, str)
                scores[row] = self._pool._count(call.function, "errors", score) if bad else score
        elif call.again:
            self._call(call.function, call.rows, call.attempt + 1)
        elif len(call.rows) > 1:
            for row in call.rows:
                self._call(call.function, (row,))
        else:
            kind = "timeouts" if isinstance(call.outcome, TimeoutError) else "errors"
            scores[call.rows[0]] = self._pool._count(call.function, kind, str(call.outcome))


def _outcome(future: Future[Outcome], timeout: float) -> Outcome | TimeoutError | _Lost:
    # Not future.result(): what the worker died of may be a SystemExit, which must not be raised here.
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, TimeoutError):
        return TimeoutError(f"killed after {timeout:g} s")
    if isinstance(error, BrokenProcessPool):
        return _Lost("its process is gone")
    if isinstance(error, ProcessExpired):
        return _Died(f"its process died (exit code {error.exitcode})")
    return f"{type(error).__name__}: {error}"


def _arguments(
    problem: Problem, completions: Sequence[Completion], prompt: str | Sequence[Message], prompt_suffix: str
) -> dict[str, list[Any]]:
    row = {**problem.columns, "solution": problem.solution}
    row["prompts"] = prompt if isinstance(prompt, str) else list(prompt)
    texts = [completion.text for completion in completions]
    return {
        **{name: [value] * len(completions) for name, value in row.items()},
        "completions": texts if isinstance(prompt, str) else [[{"role": "assistant", "content": t}] for t in texts],
        "completion_ids": [list(completion.token_ids) for completion in completions],
        "prompt_suffix": [prompt_suffix] * len(completions),
    }


def _check_picklable(arguments: Mapping[str, list[Any]], problem: Problem) -> None:
    for name, values in arguments.items():
        try:
            pickle.dumps(values)
        except Exception as error:  # pickle raises whatever a value's own hooks raise
            raise ValueError(
                f"column '{name}' of row {problem.index} cannot be sent to reward workers "
                f"({type(error).__name__}: {error}); drop it or make it plain data"
            ) from error
