"""Completions of several turns: after a call the environment is asked, its answer is appended, and the policy goes on.

    o = w_1 + s_1 + w_2 + s_2 + … + w_k        w: ids that the policy wrote, s: what tools said, in the template's ids

Each further turn is a request of its own, whose prompt is everything before it, so the engine's prefix cache holds all
but the last tool's answer. ``max_completion_length`` counts all of o. The pump asks: nothing here waits for a tool.
"""

from __future__ import annotations

import inspect
import logging
import math
from base64 import b64decode
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from igrpo.data_types import Completion, Kept, Message, Pickled, Trajectory, merged
from igrpo.engines import Request
from igrpo.environments.calls import ToolCall, read_calls
from igrpo.environments.sessions import EnvironmentFailed, Session
from igrpo.environments.setup import Environment, reset_seed, row_of
from igrpo.rewards.functions import BUILTIN, RewardFunction
from igrpo.rollout.prompts import PromptBuilder
from igrpo.settings import ConfigError
from igrpo.terminal import printable

Call = Any
"""``pump.Call``, of which only the problem is read."""
MAX_LOGGED = 20
MOST_SESSIONS = 256
"""Environments at once: each is a process, and one of the 1024 files that a program may commonly open."""
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Path:
    """One completion on its way."""

    call: Call
    number: int
    request: Request
    name: str
    last: Completion
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    kept: Kept | None = None
    runs: list[tuple[int, int]] = field(default_factory=list)
    """As in ``Completion``; what a tool said counts as of the turn before it."""
    spans: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    asked: list[ToolCall] = field(default_factory=list)
    session: Session | None = None
    ready: bool = False
    """Its environment was reset."""
    calls: int = 0
    failures: int = 0
    turns: int = 0
    ended: str = ""
    done: bool = False
    reward: float | str | None = None
    environment: Pickled | None = None


def turns_of(
    environment: Environment | None, prompts: PromptBuilder, functions: Sequence[RewardFunction]
) -> Turns | None:
    """None where there is no environment.

    Args:
        functions: that score the completions.
    """
    return None if environment is None else Turns(environment, prompts, functions)


class Turns:
    """What the completions of calls are made of, turn by turn; see ``Pump``.

    Args:
        functions: that score the completions: one may ask for ``get_reward``, or for the environments themselves.
    """

    def __init__(self, environment: Environment, prompts: PromptBuilder, functions: Sequence[RewardFunction]):
        self.environments, self.seed = environment.sessions, environment.seed
        self.template, self.tokenizer = prompts.tools, prompts.tokenizer
        self.on_error = environment.on_error
        self.most = environment.config.max_tool_calling_iterations
        self.vocab_size = prompts.vocab_size or math.inf
        self.wants_reward = any(function.path == BUILTIN["environment"] for function in functions)
        self.wants_state = any(map(_sees_environments, functions))
        self._paths: dict[Call, list[_Path]] = {}
        self._waiting: dict[_Path, None] = {}
        self._open: set[_Path] = set()
        self._queue: dict[_Path, None] = {}  # for one of MOST_SESSIONS; those that have one need nothing from these
        self._going_on: dict[str, _Path] = {}
        self._requests: list[tuple[_Path, Request]] = []
        self._count = 0
        self._logged: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether any environment is being asked."""
        return bool(self._waiting)

    def begin(self, call: Call, first: Iterable[tuple[Request, Sequence[Completion]]]) -> None:
        """A call's first turns have come."""
        self._paths[call] = []
        for request, completions in first:
            for i, completion in enumerate(completions):
                self._count += 1
                path = _Path(call, self._count, request, f"{request.request_id}/{i}", completion)
                self._paths[call].append(path)
        for path in self._paths[call]:
            self._wrote(path, path.last)

    def is_turn(self, name: str) -> bool:
        """Whether a request is a further turn of a completion."""
        return name in self._going_on

    def go_on(self, name: str, completion: Completion) -> None:
        """Takes a further turn."""
        self._wrote(self._going_on.pop(name), completion)

    def poll(self, seconds: float) -> None:
        """Takes what environments say, after waiting for the first so long."""
        if self._waiting:
            self.environments.poll(seconds)
        for path in [path for path in self._waiting if path.session.answered]:  # type: ignore[union-attr]
            del self._waiting[path]
            self._answered(path)

    def requests(self) -> list[tuple[Call, Request]]:
        """Further turns that can be sampled now."""
        ready, self._requests = sorted(self._requests, key=lambda one: one[0].number), []
        return [(path.call, request) for path, request in ready]

    def completed(self) -> list[tuple[Call, list[Completion]]]:
        """Calls all of whose completions are whole."""
        whole = [call for call, paths in self._paths.items() if all(path.done for path in paths)]
        return [(call, [self._completion(path) for path in self._paths.pop(call)]) for call in whole]

    def abort(self, calls: Collection[Call]) -> None:
        self._queue = {path: None for path in self._queue if path.call not in calls}
        for call in calls:
            for path in self._paths.pop(call, ()):
                self._waiting.pop(path, None)
                self._end_session(path)
        self._going_on = {name: path for name, path in self._going_on.items() if path.call not in calls}
        self._requests = [(path, request) for path, request in self._requests if path.call not in calls]

    # --- one path

    def _wrote(self, path: _Path, completion: Completion) -> None:
        """A turn of the policy has come."""
        prompt = path.request.prompt_ids + path.ids
        path.last, path.turns = completion, path.turns + 1
        path.ids += completion.token_ids
        path.logprobs += completion.logprobs
        path.spans.append(len(completion.token_ids))
        path.runs += completion.runs
        if completion.kept is not None:
            before = path.kept or Kept(b"", b"")
            path.kept = Kept(before.ids + completion.kept.ids, before.counts + completion.kept.counts)
        calls = []
        if self.template is not None and not completion.truncated:
            calls = read_calls(self.tokenizer, completion.token_ids, prompt, self.template.schemas)
        asked = {"tool_calls": [one.message(i) for i, one in enumerate(calls)]} if calls else {}
        path.messages.append({"role": "assistant", "content": completion.text, **asked})
        path.asked = calls
        if not calls:
            self._finish(path)
        elif self.most is not None and path.turns > self.most:
            self._cut(path, "turns")
        else:
            path.calls += len(calls)
            self._ask(path)

    def _ask(self, path: _Path) -> None:
        """Resets the environment, makes the calls, or asks for what it is worth: what comes next."""
        if path.session is None:
            if path.asked and all(call.wrong for call in path.asked):
                self._said(path, [])  # nobody has to be asked
                return
            if len(self._open) >= MOST_SESSIONS:
                self._queue[path] = None
                return
            self._open.add(path)
            path.session = self.environments.open()
            row, seed = row_of(path.call.problem), reset_seed(path.call.problem, self.seed)
            self.environments.ask(path.session, "reset", row, seed, f"{self.seed}/{path.name}")
        elif path.asked:
            good = [(call.name, call.arguments) for call in path.asked if not call.wrong]
            if not good:
                self._said(path, [])
                return
            self.environments.ask(path.session, "call", good)
        else:
            self.environments.ask(path.session, "finish", self.wants_reward, self.wants_state)
        self._waiting[path] = None

    def _answered(self, path: _Path) -> None:
        try:
            answer = path.session.take()  # type: ignore[union-attr]
            if not path.ready:
                if (answer or "") != path.call.problem.observation:
                    raise EnvironmentFailed("reset: it said something else of this row when the run began")
                path.ready = True
                self._ask(path)
            elif path.asked:
                self._said(path, answer)
            else:
                self._judged(path, answer)
        except EnvironmentFailed as error:
            self._failed(path, str(error))

    def _said(self, path: _Path, answers: Sequence[tuple[str, bool]]) -> None:
        """Tools have answered: the policy goes on, where there is room."""
        calls, answers = path.asked, list(answers)
        said = [(f"Error: {call.wrong}", True) if call.wrong else answers.pop(0) for call in calls]
        texts = [text for text, _ in said]
        try:
            between = self.template.between(calls, texts, path.ids[-1])  # type: ignore[union-attr]
            if max(between) >= self.vocab_size:
                raise ValueError("what the tool said has tokens that the model does not know")
        except (ConfigError, ValueError) as error:
            self._failed(path, f"call: {error}")
            return
        path.failures += sum(failed for _, failed in said)
        left = path.request.sampling.max_tokens - len(path.ids) - len(between)
        if left <= 0:
            self._cut(path, "tokens")
            return
        path.ids += between
        path.logprobs += (math.nan,) * len(between)
        path.spans.append(len(between))
        path.runs.append((path.runs[-1][0], len(between)))
        for call, text in zip(calls, texts, strict=True):
            path.messages.append({"role": "tool", "name": call.name, "content": text})
        path.asked = []
        first = path.request
        request = Request(
            f"{path.name}/{path.turns}", first.prompt_ids + path.ids, 1, replace(first.sampling, max_tokens=left)
        )
        self._going_on[request.request_id] = path
        self._requests.append((path, request))

    def _cut(self, path: _Path, why: str) -> None:
        """A limit leaves a call unanswered."""
        path.ended = why
        self._finish(path)

    def _failed(self, path: _Path, why: str) -> None:
        """Its environment is no more: the completion ends with the policy's turn."""
        path.failures += len(path.asked)
        path.ended = printable(why, 1000)
        # What a policy may do to a tool ends no run; an environment that cannot begin or judge does.
        path.reward = self.on_error if path.asked and path.ready else path.ended
        self._say(f"an environment ended early, its completion is scored as it is: {path.ended}")
        path.asked, path.done = [], True
        self._end_session(path)

    def _finish(self, path: _Path) -> None:
        path.asked = []
        if self.wants_reward or self.wants_state:
            self._ask(path)
        else:
            path.done = True
            self._end_session(path)

    def _judged(self, path: _Path, answer: dict[str, Any]) -> None:
        path.reward, state = answer.get("reward"), answer.get("environment")
        if state is not None:
            try:
                path.environment = Pickled(b64decode(state, validate=True))
            except ValueError:
                self._say(state)
        path.done = True
        self._end_session(path)

    def _say(self, text: str) -> None:
        if text not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(text)
            logger.warning("%s", printable(text, 1000))

    def _end_session(self, path: _Path) -> None:
        if path.session is not None:
            self.environments.end(path.session)
            self._open.discard(path)
        while self._queue and len(self._open) < MOST_SESSIONS:
            following = next(iter(self._queue))
            del self._queue[following]
            self._ask(following)

    def _completion(self, path: _Path) -> Completion:
        if path.session is None and len(path.spans) == 1 and not path.calls and not path.ended:
            return path.last
        trajectory = Trajectory(
            tuple(path.spans), tuple(path.messages), path.calls, path.failures, path.ended, path.reward,
            path.environment,
        )  # fmt: skip
        cut = path.ended in ("tokens", "turns")
        return replace(
            path.last,
            token_ids=path.ids,
            logprobs=path.logprobs,
            text="\n".join(_shown(message) for message in path.messages),
            finish_reason="length" if cut else path.last.finish_reason,
            kept=path.kept,
            trajectory=trajectory,
            versions=merged(path.runs),
        )


def _shown(message: Message) -> str:
    return message["content"] if message["role"] == "assistant" else f"[{message['name']}] {message['content']}"


def _sees_environments(function: RewardFunction) -> bool:
    """Whether a reward function names the environments."""
    if function.path == BUILTIN["judge"]:
        return False
    try:
        return "environments" in inspect.signature(function.load()).parameters
    except ValueError:  # some functions written in C tell no signature
        return False
