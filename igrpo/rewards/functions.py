"""Reward functions, and how a configuration names them.

A reward function is called as TRL calls it, ``f(prompts, completions, completion_ids, **columns)``: every argument is a
list with one element per completion, and so is the result; None in it means "cannot be judged". Completions are
strings, or lists of messages when the prompt is a conversation.

Importing this module is cheap: reward workers start with it. math-verify and reasoning-gym load on first use.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

from igrpo.rewards.grading.answers import grade, read_reference
from igrpo.rewards.grading.arithmetic import explodes
from igrpo.rewards.grading.by_math_verify import grade_by_math_verify
from igrpo.rewards.grading.notation import MATH_FUNCTIONS
from igrpo.rewards.grading.passages import (
    MAX_ANSWER_CHARS,
    CompletionText,
    completion_text,
    extract_answer,
    whole_texts,
)
from igrpo.settings import did_you_mean

if TYPE_CHECKING:
    from igrpo.rewards.config import RewardConfig


def accuracy(
    completions: Sequence[CompletionText],
    solution: Sequence[str | Sequence[str]],
    prompts: Sequence[Any] | None = None,
    prompt_suffix: Sequence[str] | None = None,
    grader: str = "igrpo",
    **_: Any,
) -> list[float | None]:
    """1.0 for the right answer, 0.0 for a wrong one or none, None where the reference cannot be read.

    Args:
        solution: Reference answers; where one is a list, each of it is right.
        grader: ``"math_verify"`` lets that library read and compare the answers.
    """
    scores = []
    questions = map(completion_text, prompts or [""] * len(completions))
    for text, cell, question in zip(whole_texts(completions, prompt_suffix), solution, questions, strict=True):
        accepted = [cell] if isinstance(cell, str) or not isinstance(cell, Sequence) else cell
        judged = [score for one in accepted if (score := _graded(text, str(one), question, grader)) is not None]
        scores.append(max(judged, default=None))
    return scores


@lru_cache(maxsize=256)
def _graded(text: str, solution: str, question: str, grader: str) -> float | None:
    """Once for all rewards of a completion that ask for it in this process."""
    if grader == "math_verify":
        return grade_by_math_verify(text, solution)
    reference = read_reference(solution)
    longest = max(MAX_ANSWER_CHARS, len(reference.text) + 100)
    answer = extract_answer(text, words=reference.words, lines=reference.lines, longest=longest)
    return grade(reference, answer, question)


def format(completions: Sequence[CompletionText], prompt_suffix: Sequence[str] | None = None, **_: Any) -> list[float]:
    """1.0 for exactly ``<think>…</think><answer>…</answer>``, one of each tag and only blanks around them; else 0.0.

    Tags that the prompt already ends with (``prompt_suffix``) count as the completion's.
    """
    return [float(_well_formed(text)) for text in whole_texts(completions, prompt_suffix)]


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def _well_formed(text: str) -> bool:
    single = all(text.count(tag) == 1 for tag in TAGS)
    return single and bool(re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.DOTALL))


def reasoning_gym_score(
    completions: Sequence[CompletionText],
    question: Sequence[str],
    answer: Sequence[str | None],
    metadata: Sequence[dict[str, Any]],
    task_options: Sequence[dict[str, Any] | None] | None = None,
    prompt_suffix: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """reasoning-gym's own score of the extracted answer, partial credit included.

    The columns are those of a reasoning-gym entry; ``data.sources`` adds ``task_options``, which some scorers consult.
    """
    scores = []
    for i, text in enumerate(whole_texts(completions, prompt_suffix)):
        task = metadata[i]["source_dataset"]
        reference = read_reference(answer[i] or "")
        given = extract_answer(text, words=reference.number is None, lines=reference.lines)
        if given is not None and not (_harmless(task, given) and _numbers_as_written(given, answer[i] or "")):
            given = None
        entry = {"question": question[i], "answer": answer[i], "metadata": metadata[i]}
        options = json.dumps((task_options and task_options[i]) or {}, sort_keys=True)
        scores.append(float(_reasoning_gym_task(task, options).score_answer(given, entry)))
    return scores


@cache
def _reasoning_gym_task(task: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options))


EVALUATING_TASKS = {
    "literal": frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}),
    "formula": frozenset(
        {"countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"}
    ),
}
"""reasoning-gym 0.1.25 tasks whose scorer runs ``eval`` (literal) or SymPy's ``parse_expr`` (formula) on the answer."""


_SYMPY_NAMES = MATH_FUNCTIONS | {"asin", "acos", "atan", "Abs"}


_ODD_NUMBER = re.compile(
    r"(?<![A-Za-z])(?:nan|inf|infinity)j?(?![A-Za-z])|\d_\d|(?![0-9])\d|\d{301}|(?P<float>[\d.]*\d\.?e[-+]?\d+)",
    re.IGNORECASE,
)


def _numbers_as_written(answer: str, reference: str) -> bool:
    """Whether Python reads the numbers of an answer as a person does: scorers call ``float`` and ``int``, which take
    ``nan`` (as near to everything as anything), ``1e999``, ``1_0`` and digits of other scripts."""
    for found in _ODD_NUMBER.finditer(answer):
        if found[0] in reference:
            continue
        if found["float"] is None or len(found["float"]) > 300:
            return False
        try:
            value = float(found["float"])
        except ValueError:
            return False
        if math.isinf(value) or (value == 0.0 and re.search(r"[1-9]", re.split("[eE]", found["float"])[0])):
            return False
    return True


def _harmless(task: str, answer: str) -> bool:
    """Whether the answer can do nothing but be compared, where reasoning-gym would execute it as Python."""
    if task in EVALUATING_TASKS["literal"]:
        if re.fullmatch(r"[\w\s]*", answer):
            return True
        try:
            ast.literal_eval(answer)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False
    elif task in EVALUATING_TASKS["formula"]:
        names = re.findall(r"[^\W\d]+", answer)
        allowed = all((len(name) == 1 and name.isalpha()) or name in _SYMPY_NAMES for name in names)
        return allowed and bool(re.fullmatch(r"[\w\s+\-*/^().]*", answer)) and not explodes(answer)
    return True


def soft_overlong_punishment(
    completion_ids: Sequence[Sequence[int]], max_completion_length: int, soft_punish_cache: int, **_: Any
) -> list[float]:
    """DAPO's length penalty: 0 up to L - C tokens, falling evenly to -1 at L.

    With L = ``max_completion_length`` and C = ``soft_punish_cache``: R(n) = ((L - C) - n) / C for L - C < n <= L.
    """
    free = max_completion_length - soft_punish_cache
    return [-min(max(len(ids) - free, 0) / soft_punish_cache, 1.0) for ids in completion_ids]


def environment(environment_rewards: Sequence[float | str | None], **_: Any) -> list[float | str | None]:
    """What each completion's environment said in ``get_reward``; text, which is no score, where it failed."""
    return list(environment_rewards)


HIGHEST = {
    "accuracy": 1.0, "format": 1.0, "reasoning_gym_score": 1.0, "soft_overlong_punishment": 0.0, "judge": 1.0,
    "repetition_penalty": 0.0, "length": 0.5, "tag_count": 1.0, "reasoning_steps": 1.0,
}  # fmt: skip
"""The best score of each built-in function; that of `cosine` is a setting."""
SHAPING = ("cosine", "repetition_penalty", "length", "tag_count", "reasoning_steps")
COSINE_ENDS = (
    "cosine_min_value_wrong",
    "cosine_max_value_wrong",
    "cosine_min_value_correct",
    "cosine_max_value_correct",
)
BUILTIN = {
    **{name: f"igrpo.rewards.functions:{name}" for name in HIGHEST},
    **{name: f"igrpo.rewards.shaping:{name}" for name in SHAPING},
    "judge": "igrpo.rewards.judge:Judge",
    "environment": "igrpo.rewards.functions:environment",
}
OPTIONS = {
    "soft_overlong_punishment": ("max_completion_length", "soft_punish_cache"),
    "accuracy": ("grader",),
    "cosine": (*COSINE_ENDS, "cosine_max_len", "max_completion_length", "grader"),
    "length": ("grader",),
    "repetition_penalty": ("repetition_n_grams", "repetition_max_penalty"),
}
"""Keys of the configuration that a built-in function takes as arguments."""
TRLS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
"""Names that TRL's own training script knows."""
RUN_CODE = ("code", "binary_code", "ioi_code", "cf_code", "code_format")
"""open-r1's rewards of programs."""


def highest_reward(config: RewardConfig) -> float | None:
    """The highest reward a completion can get; None where functions of the user's leave it open."""
    if config.early_stop_reward is not None:
        return config.early_stop_reward
    highest = HIGHEST | {"cosine": max(getattr(config, key) for key in COSINE_ENDS)}
    if not set(config.reward_funcs) <= set(highest):
        return None
    weights = config.reward_weights or [1.0] * len(config.reward_funcs)
    return sum(max(w, 0.0) * highest[name] for w, name in zip(weights, config.reward_funcs, strict=True))


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function by name, so that it travels to a worker process and is imported there.

    Example: ``RewardFunction("accuracy", "igrpo.rewards.functions:accuracy")``
    """

    name: str
    """The ``<name>`` of ``rewards/<name>/…`` in the logs."""
    path: str
    """``package.module:function``"""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that the function takes by name."""

    def load(self) -> Callable[..., Any]:
        module, _, name = self.path.partition(":")
        function = getattr(importlib.import_module(module), name)
        return partial(function, **self.options) if self.options else function

    def sees(self, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The arguments of one call: a setting goes before a column of its name. TRL's own functions know no
        ``prompt_suffix``, which stands before their text, and no completions but messages."""
        arguments = {name: values for name, values in arguments.items() if name not in self.options}
        if not self.path.startswith("trl.rewards:"):
            return arguments
        texts = whole_texts(arguments["completions"], arguments["prompt_suffix"])
        messages = [[{"role": "assistant", "content": text}] for text in texts]
        return {**arguments, "completions": messages}


def load_reward_functions(names: Sequence[str], config: RewardConfig | None = None) -> list[RewardFunction]:
    """Resolve the names of ``reward_funcs``: built-in ones, or ``package.module:function``; each is imported once here.

    Args:
        config: where built-in functions with settings of their own find them.

    Raises:
        ValueError: A name is unknown or given twice, or its module or function cannot be imported.
    """
    functions: list[RewardFunction] = []
    for name in names:
        if name in RUN_CODE:
            raise ValueError(
                f"'{name}' runs programs that the model wrote, and there is no sandbox here: write one of your own "
                "that calls one, as package.module:function"
            )
        name = _as_path(name)
        if ":" in name:
            function = RewardFunction(_logged_name(name, {function.name for function in functions}), name)
        elif name in BUILTIN:
            options = {key: getattr(config, key) for key in OPTIONS.get(name, ()) if config is not None}
            function = RewardFunction(name, BUILTIN[name], options)
        else:
            known, hint = ", ".join(BUILTIN), did_you_mean(name, BUILTIN, cutoff=0.3, quote="'")
            raise ValueError(f"unknown '{name}' (known: {known}, or package.module:function){hint}")
        _check_loads(function)
        if any(other.path == function.path for other in functions):
            raise ValueError(f"'{name}' is given twice; use reward_weights to weigh it")
        functions.append(function)
    return functions


def reward_names(names: Sequence[str]) -> list[str]:
    """The ``<name>`` of ``rewards/<name>/…`` for each entry of ``reward_funcs``; nothing is imported."""
    logged: list[str] = []
    for name in map(_as_path, names):
        logged.append(_logged_name(name, set(logged)) if ":" in name else name)
    return logged


def correctness_reward(config: RewardConfig) -> str:
    """The reward that says right or wrong: ``accuracy`` if there is one, else the first."""
    if "accuracy" in config.reward_funcs:
        return "accuracy"
    return reward_names(config.reward_funcs)[0]


def _logged_name(path: str, taken: set[str]) -> str:
    """A function of the user's goes by its own name, unless that is taken."""
    short = path.partition(":")[2]
    return path if short in taken or short in BUILTIN else short


def _as_path(name: str) -> str:
    """TRL writes ``package.module.function``."""
    if name in TRLS:
        return f"trl.rewards:{name}"
    module, dot, function = name.rpartition(".")
    return f"{module}:{function}" if dot and ":" not in name else name


def _check_loads(function: RewardFunction) -> None:
    module, _, attribute = function.path.partition(":")
    if module in ("", "__main__") or not attribute:
        raise ValueError(f"'{function.path}' should read package.module:function")
    try:
        loaded = function.load()
    except AttributeError as error:
        hint = did_you_mean(attribute, dir(importlib.import_module(module)), quote="'")
        raise ValueError(f"module '{module}' has no '{attribute}'{hint}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import module '{module}' of '{function.path}': {reason}") from error
    if not callable(loaded):
        raise ValueError(f"'{function.path}' is a {type(loaded).__name__}, not a function")
