"""Reward functions in worker processes, each call under a hard deadline.

A reward function reads text that a model made up, so it will one day loop for ever, raise, exhaust its stack or take
its process down. None of that reaches the training loop: a worker past its deadline is killed and replaced, a call that
failed for a batch is repeated one completion at a time, and a completion that fails alone gets ``reward_error_value``.
A completion whose worker dies gets it after the third death only, since somebody else may have killed the worker.

The judge is the exception: it waits for a network and runs no foreign code, so it has threads here and timeouts of its
own.

Workers inherit no CUDA context, no engine and no keys. What they start ends with the call that started it
(``worker.py``, ``keeper.py``), and one that was used up or spoilt is replaced (``process.py``).
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from igrpo.data_types import Completion, Message, Problem, Scored
from igrpo.rewards.functions import BUILTIN, RewardFunction
from igrpo.rewards.workers.process import Died, Failure, Lost, Result, RewardProcess, worker_environment
from igrpo.rewards.workers.tally import Tally
from igrpo.terminal import printable

if TYPE_CHECKING:
    from igrpo.rewards.judge import Judge

logger = logging.getLogger(__name__)

STALL_SECONDS = 120.0
"""A worker that has not imported its functions after so long does not start."""
MAX_LOGGED = 20
"""Distinct error messages shown per reward function; the rest is only counted."""
MAX_PRINTED, PRINTED_A_MINUTE = 20, 200
"""Lines shown of what a function prints in one call, and in all calls of a minute."""
OF_TRAJECTORIES = (("environments", "environment"), ("environment_rewards", "reward"))
"""Arguments of reward functions, and the field of a trajectory that each is."""
ATTEMPTS = 3
"""How often a call may lose its worker before that is its own fault: an earlier call may be guilty, or whoever kills
processes on this machine."""
CONFIRMED = 3
"""After so many failures of a function that a new worker had, too, one after the other, they are its own."""


@dataclass(eq=False)
class _Call:
    """One function on some of a problem's completions."""

    function: RewardFunction
    rows: tuple[int, ...]
    payload: bytes
    attempt: int = 1
    alone: bool = False
    """It failed once in a worker that earlier calls may have spoilt, and is repeated in a new one."""
    outcome: Result | None = None
    """None while it waits or runs."""

    @property
    def again(self) -> bool:
        """Whether it is worth repeating as it is: a guilty completion is found faster among single rows."""
        lost = isinstance(self.outcome, Lost) and self.attempt < ATTEMPTS
        return lost and (len(self.rows) == 1 or not isinstance(self.outcome, Died))


class RewardPool:
    """Scores completions with several reward functions; use as a context manager or call ``close``.

    Example: ``with RewardPool(functions) as pool: scored = pool.submit(problem, completions, prompt).result()``

    Args:
        functions: What to call, from ``igrpo.rewards.functions.load_reward_functions``.
        weights: One per function; 1.0 each by default.
        num_workers: Worker processes. One call runs in one worker: one function on one problem's completions.
        timeout: Seconds that one call may take.
        on_error: Score of a completion on which a function fails; None leaves the function out of its reward.
        judge: What the function of that name asks, as many completions at once as its configuration says.
        memory_gib: What a worker and all that its functions start may hold; who exceeds it is killed.
        environment: Variables of the workers; by default all of this process but those that look like keys.

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
        memory_gib: float = 8.0,
        environment: Mapping[str, str] | None = None,
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
        self._tallies = {name: Tally() for name in names}
        self._replaced = 0
        self._logged: dict[str, set[str]] = {}
        self._printed: dict[str, tuple[int, int]] = {}
        self._confirmed = dict.fromkeys(names, 0)
        self._changed = threading.Condition(threading.RLock())  # guards outcomes, counts and what was logged
        self._queue = SimpleQueue[_Call | None]()
        self._closed = False
        self._broken: BaseException | None = None
        self._local = tuple(function for function in functions if function.path != BUILTIN["judge"])
        variables = worker_environment(())[0] if environment is None else environment
        self._workers = [
            RewardProcess(self._local, timeout, STALL_SECONDS, int(memory_gib * 2**30), variables, self._told)
            for _ in range(num_workers if self._local else 0)
        ]
        self._threads = [threading.Thread(target=self._work, args=(one,), daemon=True) for one in self._workers]
        self._judge, self._to_judge = judge, SimpleQueue[_Call]()
        for _ in range(judge.config.judge_max_concurrency if judge is not None else 0):
            threading.Thread(target=self._judge_calls, name="judge", daemon=True).start()
        for thread in self._threads:
            thread.start()

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
        with self._changed:
            counts, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return counts

    def replaced(self) -> int:
        """How many workers since the last call had to be replaced."""
        with self._changed:
            replaced, self._replaced = self._replaced, 0
        return replaced

    def tallies(self) -> dict[str, Tally]:
        """What became of each function's completions since the last call."""
        with self._changed:
            tallies, self._tallies = self._tallies, {name: Tally() for name in self._tallies}
        return tallies

    def failing(self) -> bool:
        """Whether a function has failed on all completions since the last ``tallies``."""
        return any(tally.failed and not tally.scored for tally in self._tallies.values())

    def close(self) -> None:
        """Stop the workers; unfinished scores are lost. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                self._queue.put(None)
                worker.stop()
            for thread in self._threads:
                thread.join(timeout=20)
            if self._judge is not None:
                self._judge.close()  # what its daemon threads still ask for fails, and they die with the program

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, worker: RewardProcess) -> None:
        """A thread's life: one call after the other, in a worker that it alone speaks to."""
        try:
            while not self._closed:
                with contextlib.suppress(Lost):  # a call says why
                    worker.start()  # not only when a call has to wait for its imports
                if (call := self._queue.get()) is None:
                    return
                outcome = worker.call(self._local.index(call.function), call.payload, call.alone)
                if isinstance(outcome, list) and len(outcome) != len(call.rows):
                    outcome = Failure("its process sent what is no reply")
                with self._changed:
                    call.outcome = outcome
                    self._changed.notify_all()
        except BaseException as error:  # told by `done`: nobody must wait for ever
            self._broken = error
            raise
        finally:
            worker.close()

    def _told(self, name: str, text: str) -> None:
        """By a worker: what a function printed, or why it is replaced."""
        if self._closed:
            return
        if name == "replaced":
            with self._changed:
                self._replaced += 1
            self._log_once("replaced workers", f"a reward worker is replaced: {printable(text, 500)}")
            return
        lines, minute = text.split("\n"), int(time.monotonic() // 60)
        with self._changed:
            begun, printed = self._printed.get(name, (minute, 0))
            printed = printed if begun == minute else 0
            self._printed[name] = minute, printed + len(lines)
        shown = max(0, min(MAX_PRINTED, PRINTED_A_MINUTE - printed))
        for line in lines[:shown]:
            logger.info("%s printed: %s", name, printable(line, 500))
        if shown < len(lines) and printed < PRINTED_A_MINUTE:
            logger.info("%s printed: … %s", name, printable(lines[-1], 500))

    def _judge_calls(self) -> None:
        """A thread's life: one completion after the other."""
        while not self._closed:
            call = self._to_judge.get()
            outcome: Result
            try:
                row = {name: values[0] for name, values in pickle.loads(call.payload).items()}
                outcome = [self._judge.score(row["prompts"], row["solution"], row["completions"])]  # type: ignore[union-attr]
            except TimeoutError as error:
                outcome = error
            except Exception as error:  # the thread must live on, whatever the client raises
                outcome = Failure(f"{type(error).__name__}: {error}")
            with self._changed:
                call.outcome = outcome
                self._changed.notify_all()

    def _count(self, function: RewardFunction, kind: Literal["errors", "timeouts"], message: str) -> float | None:
        message = printable(message, 1000)
        tally = self._tallies[function.name]
        self._counts[f"rewards/{function.name}/{kind}"] += 1
        tally.failed, tally.error = tally.failed + 1, message
        given = "not scored" if self.on_error is None else f"scored {self.on_error}"
        self._log_once(function.name, f"reward function {function.name} failed, completion {given}: {message}")
        return self.on_error

    def _log_once(self, about: str, message: str) -> None:
        with self._changed:
            logged = self._logged.setdefault(about, set())
            if message in logged or len(logged) >= MAX_LOGGED:
                return
            logged.add(message)
        last = f"; further messages about {about} are only counted" if len(logged) == MAX_LOGGED else ""
        logger.warning("%s%s", message, last)

    def _is_doubtful(self, call: _Call) -> bool:
        """Whether a failure may be the worker's, which earlier calls may have spoilt, and a new one should try."""
        failed_alone = isinstance(call.outcome, Failure) and len(call.rows) == 1
        if call.alone:
            self._confirmed[call.function.name] = self._confirmed[call.function.name] + 1 if failed_alone else 0
            return False
        return failed_alone and not call.outcome.fresh and self._confirmed[call.function.name] < CONFIRMED  # type: ignore[union-attr]


class PendingScores:
    """The scores of one ``submit``."""

    def __init__(self, pool: RewardPool, completions: Sequence[Completion], arguments: Mapping[str, list[Any]]) -> None:
        self._pool, self._arguments = pool, arguments
        self._completions = tuple(map(_without_environment, completions))
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
            if self._pool._broken is not None:
                raise RuntimeError("a thread of the reward pool ended") from self._pool._broken
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

    def _call(self, function: RewardFunction, rows: tuple[int, ...], attempt: int = 1, alone: bool = False) -> None:
        arguments = {name: [values[row] for row in rows] for name, values in self._arguments.items()}
        arguments = function.sees(arguments)
        call = _Call(function, rows, pickle.dumps(arguments), attempt, alone)
        self._open.append(call)
        (self._pool._queue if function in self._pool._local else self._pool._to_judge).put(call)

    def _take(self, call: _Call) -> None:
        """Keep the scores of a call that succeeded; repeat one that failed, row by row; give up on a single row."""
        name, outcome, pool = call.function.name, call.outcome, self._pool
        doubtful = pool._is_doubtful(call)
        if isinstance(outcome, list):
            for row, score in zip(call.rows, outcome, strict=True):
                bad = isinstance(score, str)
                pool._tallies[name].scored += not bad
                self._scores[name][row] = pool._count(call.function, "errors", score) if bad else score
        elif call.again:
            self._call(call.function, call.rows, call.attempt + 1)
        elif doubtful:
            self._call(call.function, call.rows, call.attempt, alone=True)
        elif len(call.rows) > 1:
            for row in call.rows:
                self._call(call.function, (row,))
        else:
            kind: Literal["errors", "timeouts"] = "timeouts" if isinstance(outcome, TimeoutError) else "errors"
            text = outcome.text if isinstance(outcome, Failure) else str(outcome)
            self._scores[name][call.rows[0]] = pool._count(call.function, kind, text)


def _arguments(
    problem: Problem, completions: Sequence[Completion], prompt: str | Sequence[Message], prompt_suffix: str
) -> dict[str, list[Any]]:
    row = {**problem.columns, "solution": problem.solution}
    row["prompts"] = prompt if isinstance(prompt, str) else list(prompt)
    texts = [completion.text for completion in completions]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    found = [completion.trajectory for completion in completions]
    columns = {name: [getattr(one, key, None) for one in found] for name, key in OF_TRAJECTORIES}
    if any(found):
        said = [old if one is None else list(one.messages) for old, one in zip(said, found, strict=True)]
    return {
        **{name: [value] * len(completions) for name, value in row.items()},
        "completions": texts if isinstance(prompt, str) else said,
        "completion_ids": [list(completion.token_ids) for completion in completions],
        "prompt_suffix": [prompt_suffix] * len(completions),
        **(columns if any(found) else {}),
    }


def _without_environment(completion: Completion) -> Completion:
    """Nothing is left of an environment that had no part in a completion."""
    one = completion.trajectory
    if one is None:
        return completion
    had_part = len(one.spans) > 1 or one.calls or one.ended or one.reward is not None
    return replace(completion, trajectory=replace(one, environment=None) if had_part else None)


def _check_picklable(arguments: Mapping[str, list[Any]], problem: Problem) -> None:
    for name, values in arguments.items():
        try:
            pickle.dumps(values)
        except Exception as error:  # pickle raises whatever a value's own hooks raise
            raise ValueError(
                f"column '{name}' of row {problem.index} cannot be sent to reward workers "
                f"({type(error).__name__}: {error}); drop it or make it plain data"
            ) from error
