"""The environment of a run, from its config: its process, and what a chat template is told of its tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from igrpo.data_types import Problem
from igrpo.environments.config import EnvironmentConfig
from igrpo.environments.host import load, tools_of
from igrpo.environments.sessions import EnvironmentFailed, Environments
from igrpo.rewards.workers.process import worker_environment
from igrpo.settings import ConfigError

AT_ONCE = 16
"""Rows whose ``reset`` is asked at the same time."""


class Environment:
    """What the trainer knows of the environment, of which it makes one to look at, and its processes.

    Args:
        variables: of the processes.
        memory: bytes that the process of one trajectory may hold.
        on_error: what a completion is worth whose call ended its environment.

    Raises:
        ConfigError: it cannot be imported or made, has no ``reset``, or a tool is not described.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        seed: int,
        variables: Mapping[str, str],
        memory: int,
        on_error: float | None = 0.0,
    ):
        self.config, self.seed, self.on_error = config, seed, on_error
        one = _made(config.environment_factory) if config.environment_factory else None
        functions = [_imported("tools", path) for path in config.tools]
        if len({f.__name__ for f in functions}) < len(functions):
            raise ConfigError("tools: two have one name; rename one of them")
        self.has_reward = hasattr(one, "get_reward")
        if both := sorted({f.__name__ for f in functions} & tools_of(one, ()).keys()):
            raise ConfigError(f"tools: {both[0]} is a method of environment_factory, too; rename one of them")
        self.schemas = [_schema(name, tool) for name, tool in tools_of(one, functions).items()]
        self._is_silent = one is None or inspect.signature(one.reset).return_annotation in (None, "None")
        self.sessions = Environments(
            config.environment_factory, config.tools, config.tool_timeout, memory, seed, variables
        )

    def observed(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems, each with what ``reset`` says of it: asked once, before anything is sampled; one that says
        nothing is tried with the first.

        Raises:
            ConfigError: it fails on one of them.
        """
        asked_of = problems[:1] if self._is_silent else problems
        found: list[Problem] = []
        for start in range(0, len(asked_of), AT_ONCE):
            part = asked_of[start : start + AT_ONCE]
            asked = [(problem, self.sessions.open()) for problem in part]
            for problem, session in asked:
                self.sessions.ask(session, "reset", row_of(problem), reset_seed(problem, self.seed), "")
            while not all(session.answered for _, session in asked):
                self.sessions.poll(0.1)
            for problem, session in asked:
                try:
                    found.append(replace(problem, observation=session.take() or ""))
                except EnvironmentFailed as error:
                    where = problem.where or f"row {problem.index}"
                    raise ConfigError(f"environment_factory: {where}: {error}") from None
                self.sessions.end(session)
        return [*found, *problems[len(found) :]]

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self.sessions.close()


def start_environment(config: Any) -> Environment | None:
    """
    Args:
        config: with the sections of the environment, the rewards and the seed.

    Raises:
        ConfigError: it cannot be used; or a reward asks for what there is not.
    """
    asked = "environment" in config.reward_funcs
    if not config.has_environment:
        if asked:
            raise ConfigError("reward_funcs: environment is what an environment_factory's get_reward says; write one")
        return None
    variables, _ = worker_environment(config.reward_env, {config.judge_api_key_env})
    made = Environment(config, config.seed, variables, int(config.reward_memory_gib * 2**30), config.reward_error_value)
    if asked and not made.has_reward:
        made.sessions.close()
        raise ConfigError("reward_funcs: environment needs a method get_reward in environment_factory; write it")
    return made


def _made(path: str) -> Any:
    factory = _imported("environment_factory", path)
    try:
        one = factory()
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(
            f"environment_factory: {path} cannot be made ({type(error).__name__}: {error}); it is called without "
            "arguments"
        ) from error
    if not inspect.isroutine(getattr(one, "reset", None)):
        raise ConfigError(
            f"environment_factory: {type(one).__name__} has no method reset; write one, which takes the columns of a "
            "row and returns text or None"
        )
    return one


def _schema(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # transformers has several, one for each thing that it misses
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"environment_factory: the tool {name} is not described: {reason}; give each argument a type and a line "
            "under Args: in the docstring"
        ) from None


def _imported(key: str, path: str) -> Any:
    try:
        found = load(path)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"{key}: cannot import {path} ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ConfigError(f"{key}: {path} is a {type(found).__name__}, which cannot be called")
    return found


def row_of(problem: Problem) -> dict[str, Any]:
    """What ``reset`` is given: the row's columns, its prompt and its solution."""
    return {**problem.columns, "prompt": problem.prompt, "solution": problem.solution}


def reset_seed(problem: Problem, seed: int) -> str:
    """All trajectories of a row begin alike, or a group would answer different questions."""
    return f"{seed}/{problem.index}"
