"""Benchmarks by name: where their rows are on the hub, and which field holds what in files under ``--data_dir``."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo.config.train_config import TrainConfig
from igrpo.data.rows import USUAL_NAMES
from igrpo.data.sources import load_data, load_problems
from igrpo.data_types import Problem
from igrpo.settings import ConfigError, did_you_mean

HELD_OUT = "held_out"
"""The rows a run kept from its own training data (``eval_samples``)."""
HERE = ("{name}/test.jsonl", "{name}.jsonl", "{name}_test.jsonl", "test/{name}.jsonl")
"""Where a benchmark's file may lie under ``--data_dir``, first match."""


@dataclass(frozen=True, slots=True)
class Source:
    """A benchmark's rows on the hub, and the fields of the JSONL files that go round under its name."""

    hub_id: str
    split: str
    prompt: str
    solution: str
    config: str | None = None
    file_prompt: tuple[str, ...] = ("problem", "question")
    file_solution: tuple[str, ...] = ("answer", "solution")
    """In order of preference; ``solution`` is a worked solution that ends in a boxed answer."""


BENCHMARKS = {
    "aime25": Source("math-ai/aime25", "test", "problem", "answer"),
    "aime24": Source("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "math500": Source("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "amc23": Source("math-ai/amc23", "test", "question", "answer"),
    "gsm8k": Source("openai/gsm8k", "test", "question", "answer", config="main"),
    "minerva_math": Source("math-ai/minervamath", "test", "question", "answer"),
}
"""In the order of the paper's table."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    name: str
    problems: list[Problem]
    n: int
    origin: str
    """Where the rows came from and which fields were read, in words."""
    reward_funcs: tuple[str, ...] = ("accuracy",)
    reward_weights: tuple[float, ...] | None = None


def load_benchmark(
    asked: str, n: int, data_dir: str | None, max_samples: int | None, run_config: TrainConfig | None
) -> Benchmark:
    """``NAME`` or ``NAME@n``; a name of ``BENCHMARKS``, ``held_out``, a file, a hub id or ``reasoning_gym:TASK``.

    Raises:
        ConfigError: unknown name, missing file or field, hub not reachable; says what there is.
    """
    name, at, own_n = asked.rpartition("@")
    if at and own_n.isdigit() and int(own_n) > 0:
        asked, n = name, int(own_n)
    if asked == HELD_OUT:
        return _held_out(n, max_samples, run_config)
    source = BENCHMARKS.get(asked)
    try:
        if source is None:
            return _other(asked, n, max_samples)
        if data_dir is not None:
            return _from_folder(asked, source, n, Path(data_dir).expanduser(), max_samples)
        problems = load_problems(
            source.hub_id,
            dataset_config=source.config,
            dataset_split=source.split,
            dataset_prompt_column=source.prompt,
            dataset_solution_column=source.solution,
            max_samples=max_samples,
        )
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        hint = f"; --data_dir FOLDER reads FOLDER/{asked}/test.jsonl instead" if source and data_dir is None else ""
        raise ConfigError(f"benchmarks: {asked}: {str(error).removeprefix('dataset_name: ')}{hint}") from error
    return Benchmark(asked, problems, n, f"{source.hub_id}: {source.prompt} -> {source.solution}")


def _from_folder(name: str, source: Source, n: int, folder: Path, max_samples: int | None) -> Benchmark:
    if not folder.is_dir():
        raise ConfigError(f"data_dir: there is no folder {folder}")
    places = [folder / place.format(name=name) for place in HERE]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        there = sorted(str(p.relative_to(folder)) for p in folder.glob("**/*.jsonl"))[:20]
        hint = did_you_mean(name, [p.split("/")[0].removesuffix(".jsonl") for p in there])
        raise ConfigError(
            f"data_dir: {folder} has no file for {name}; put it at {name}/test.jsonl or {name}.jsonl. There are: "
            f"{', '.join(there) or 'no .jsonl files'}{hint}"
        )
    return _from_file(name, path, n, source.file_prompt, source.file_solution, max_samples)


def _from_file(
    name: str, path: Path, n: int, prompts: Sequence[str], solutions: Sequence[str], max_samples: int | None
) -> Benchmark:
    with path.open(encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), "{}")
    try:
        fields = set(json.loads(line))
    except (json.JSONDecodeError, TypeError):
        fields = set()  # load_problems says where it is broken
    prompt = next((field for field in prompts if field in fields), prompts[0])
    solution = next((field for field in solutions if field in fields and field != prompt), solutions[0])
    problems = load_problems(
        str(path), dataset_prompt_column=prompt, dataset_solution_column=solution, max_samples=max_samples
    )
    return Benchmark(name, problems, n, f"{path}: {prompt} -> {solution}")


def _other(asked: str, n: int, max_samples: int | None) -> Benchmark:
    path = Path(asked).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        prompts = ("prompt", *USUAL_NAMES["prompt"])
        return _from_file(path.stem, path, n, prompts, (*USUAL_NAMES["solution"], "solution"), max_samples)
    if asked.startswith("reasoning_gym:"):
        problems = load_problems(
            asked,
            dataset_split="test",
            dataset_prompt_column="question",
            dataset_solution_column="answer",
            max_samples=max_samples,
        )
        return Benchmark(re.sub(r"\W+", "_", asked), problems, n, asked)
    near = difflib.get_close_matches(asked, [*BENCHMARKS, HELD_OUT], n=1)
    hint = f", did you mean {near[0]}" if near else ""
    siblings = path.parent if path.suffix and path.parent.is_dir() else Path(".")
    files = sorted(str(p) for p in siblings.glob("*.jsonl"))[:8]
    raise ConfigError(
        f"benchmarks: there is no '{asked}'{hint}. Known: {', '.join(BENCHMARKS)}, {HELD_OUT}, reasoning_gym:TASK, or "
        f"the path of a .jsonl file (here: {', '.join(files) or 'none'})"
    )


def _held_out(n: int, max_samples: int | None, run_config: TrainConfig | None) -> Benchmark:
    if run_config is None:
        raise ConfigError(f"benchmarks: {HELD_OUT} needs --model RUN or a checkpoint of a run; this model has no run")
    if not run_config.eval_samples:
        raise ConfigError(f"benchmarks: the run held nothing out (eval_samples: 0); name another than {HELD_OUT}")
    _, problems = load_data(run_config)
    weights = run_config.reward_weights and tuple(run_config.reward_weights)
    origin = f"held out of {run_config.dataset_name}"
    return Benchmark(HELD_OUT, problems[:max_samples], n, origin, tuple(run_config.reward_funcs), weights)
