"""Problems from reasoning-gym, local files or the hub, and the order in which training visits them.

Everything that can be wrong with a data set is said here, before a model is loaded, in one line that names the key to
change. ``datasets``, ``pyarrow`` and ``reasoning_gym`` are imported only by the source that needs them.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo.data.config import DataConfig
from igrpo.data.rows import Located, read_rows
from igrpo.data_types import Problem
from igrpo.settings import ConfigError, did_you_mean

GYM_PREFIX = "reasoning_gym:"


def load_data(config: DataConfig) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on, and those that are held out.

    Raises:
        ConfigError: data that are not there or cannot be read, or too few rows to hold some out.
    """

    def load(split: str, most: int | None) -> list[Problem]:
        keys = ("dataset_name", "dataset_config", "dataset_prompt_column", "dataset_solution_column", "dataset_kwargs")
        options = {key: getattr(config, key) for key in keys}
        return load_problems(**options, dataset_split=split, max_samples=most)

    try:
        problems = load(config.dataset_train_split, config.max_train_samples)
        if not config.eval_samples:
            return problems, []
        if config.dataset_test_split is not None:
            return problems, load(config.dataset_test_split, config.eval_samples)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if len(problems) <= config.eval_samples:
        raise ConfigError(
            f"eval_samples: {config.eval_samples} of {len(problems)} rows leave none to train on; lower it or set "
            "dataset_test_split"
        )
    return problems[: -config.eval_samples], problems[-config.eval_samples :]


def load_problems(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_prompt_column: str = "prompt",
    dataset_solution_column: str = "solution",
    dataset_kwargs: Mapping[str, Any] | None = None,
    max_samples: int | None = None,
) -> list[Problem]:
    """Load a data set.

    Args:
        dataset_name: ``reasoning_gym:<task>`` or ``reasoning_gym:<task>,<task>`` (in turns); a .jsonl, .json, .parquet
            or .csv file; a folder written by ``save_to_disk`` or holding ``<split>.jsonl`` and the like; a hub id.
        dataset_config: Configuration of a hub data set.
        dataset_split: Split to take. reasoning-gym derives another seed for any split but ``train``.
        dataset_prompt_column: Column with the question: text, or messages that end in a user turn. A dot leads into a
            nested field: ``extra.question``.
        dataset_solution_column: Column with the reference answer, or with a list of those that are accepted. Reward
            functions get it as ``solution``, and all columns but the prompt under their own names.
        dataset_kwargs: For reasoning-gym ``size`` (of the whole set), ``seed`` and the task's options, those of several
            tasks as ``{task: {option: value}}``; for the hub, further arguments of ``datasets.load_dataset``.
        max_samples: Keep only the first rows.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: Anything else that cannot be loaded as asked.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; it must be at least 1")
    options = dict(dataset_kwargs or {})
    if dataset_name.startswith(GYM_PREFIX):
        return _reasoning_gym(dataset_name, options, dataset_split, max_samples)
    path = Path(dataset_name).expanduser()
    if path.exists() or _looks_local(dataset_name):
        if options or dataset_config is not None:
            raise ValueError(
                f"dataset_kwargs and dataset_config do not apply to the local '{dataset_name}'; remove them"
            )
        rows = _local_rows(path, dataset_split)
    else:
        rows = _hub_rows(dataset_name, dataset_config, dataset_split, options)
    problems = list(read_rows(rows, dataset_name, dataset_prompt_column, dataset_solution_column, max_samples))
    if not problems:
        raise ValueError(f"dataset_name: '{dataset_name}' has no rows")
    return problems


def _looks_local(name: str) -> bool:
    path = Path(name)
    return name.startswith((".", "/", "~")) or path.suffix in _READERS or (len(path.parts) > 1 and path.parent.is_dir())


def _local_rows(path: Path, split: str) -> Iterable[Located]:
    if not path.exists():
        raise FileNotFoundError(f"dataset_name: '{path}' does not exist{_nearest_sibling(path)}")
    if path.is_dir():
        return _folder_rows(path, split)
    if path.suffix not in _READERS:
        raise ValueError(f"dataset_name: '{path}' is none of {', '.join(_READERS)}; convert it or rename it")
    if split not in ("train", path.stem):
        raise ValueError(
            f"dataset_name: the file '{path}' has no split '{split}'; give the folder with {split}{path.suffix}"
        )
    try:
        return list(_READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset_name: '{path}' is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _nearest_sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; neither does the folder '{path.parent}'"
    names = sorted(sibling.name for sibling in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _folder_rows(path: Path, split: str) -> Iterable[Located]:
    for suffix in _READERS:
        if (file := path / f"{split}{suffix}").is_file():
            return _local_rows(file, split)
    if not any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        there = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"dataset_name: the folder '{path}' holds neither a saved data set nor {split}.jsonl; there is {there}"
        )
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"dataset_split: '{path}' has no '{split}', only {', '.join(data)}")
        data = data[split]
    return ((f"'{path}' row {i}", row) for i, row in enumerate(data))


def _hub_rows(name: str, config: str | None, split: str, options: Mapping[str, Any]) -> Iterable[Located]:
    if ":" in name:
        raise ValueError(
            f"dataset_name: no source '{name.partition(':')[0]}:'; it is '{GYM_PREFIX}<task>', a path or a hub id"
        )
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:  # whatever the hub client, the network or a loading script raises: the user's move
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"dataset_name: cannot load '{name}' (split '{split}') from the hub or its cache; check the name and the "
            f"network, or give a local file ({type(error).__name__}: {reason})"
        ) from error
    return ((f"'{name}' row {i}", row) for i, row in enumerate(data))


def _read_jsonl(path: Path) -> Iterator[Located]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line, f"{path}:{number}")


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = _parse_json(text, where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON, {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__} {str(row)[:40]!r}")
    return row


def _parse_json(text: str, where: str) -> Any:
    try:
        # Python refuses to read integers beyond 4,300 digits; a reference of that size is compared as it is written.
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 4000 else digits)
    except RecursionError as error:
        raise ValueError(f"{where}: brackets within brackets, too deep to be a row") from error


def _read_json(path: Path) -> Iterator[Located]:
    try:
        rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}: broken JSON, {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"dataset_name: '{path}' must be a list of JSON objects")
    return ((f"'{path}' row {i}", row) for i, row in enumerate(rows))


def _read_csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(sys.maxsize)  # reference solutions outgrow the default 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"{path}:{reader.line_num}", {key: value for key, value in row.items() if key is not None}


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"dataset_name: '{path}' is no parquet file ({error})") from error
    except (ValueError, OverflowError) as error:  # a time before year 1 or after 9999
        raise ValueError(f"dataset_name: '{path}' holds a value that Python has no type for ({error})") from error
    return ((f"'{path}' row {i}", row) for i, row in enumerate(rows))


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _reasoning_gym(name: str, options: dict[str, Any], split: str, max_samples: int | None) -> list[Problem]:
    tasks = [task.strip() for task in name.removeprefix(GYM_PREFIX).split(",")]
    size, seed = options.pop("size", 500), options.pop("seed", 0)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"dataset_kwargs: size is {size!r}; it must be a whole number of at least 1")
    if split != "train":
        seed = random.Random(f"{seed}/{split}").getrandbits(32)
    size = min(size, max_samples or size)
    per_task = options if len(tasks) > 1 else {tasks[0]: options}
    if strangers := [key for key in per_task if key not in tasks]:
        raise ValueError(
            f"dataset_kwargs: with several tasks, write '{strangers[0]}' under its task: {{{tasks[0]}: {{…}}}}"
        )
    generators = [_gym_task(task, per_task.get(task, {}), math.ceil(size / len(tasks)), seed) for task in tasks]

    def make(index: int) -> Problem:
        turn, row = index % len(tasks), index // len(tasks)
        entry = generators[turn][row]
        columns = {key: entry[key] for key in ("question", "answer", "metadata")}
        columns["task_options"] = per_task.get(tasks[turn], {})
        return Problem(index, entry["question"], entry["answer"] or "", columns, f"'{name}' row {index}")

    return [make(index) for index in range(size)]


def _gym_task(task: str, options: Mapping[str, Any], size: int, seed: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS or task == "composite":
        hint = did_you_mean(task, DATASETS, f"; its GALLERY.md shows all {len(DATASETS) - 1}", 0.5, "'")
        raise ValueError(f"dataset_name: reasoning-gym has no task '{task}'{hint}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known, f"; it has {', '.join(known)}", quote="'")
            raise ValueError(f"dataset_kwargs: task '{task}' has no option '{option}'{hint}")
    try:
        data = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
        data[0]  # some options show only here that they do not work
        return data
    except (AssertionError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"dataset_kwargs: task '{task}' refuses its options: {error}") from error


class ProblemSampler:
    """Row numbers in the order of training: each epoch a permutation of all rows that depends only on (seed, epoch).

    A batch that an epoch's end cuts short is filled from the next epoch, so no row is left out whatever the batch size.
    """

    def __init__(self, num_problems: int, seed: int, shuffle: bool) -> None:
        if num_problems < 1:
            raise ValueError(f"num_problems is {num_problems}; there is nothing to sample")
        self.num_problems, self.seed, self.shuffle = num_problems, seed, shuffle
        self.epoch, self.position = 0, 0
        self.returned: list[int] = []
        """Rows that were taken and not used; they come before all others."""
        self._order = self._epoch_order()

    def next_batch(self, n: int) -> list[int]:
        batch, self.returned = self.returned[:n], self.returned[n:]
        while len(batch) < n:
            if self.position == self.num_problems:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
            taken = self._order[self.position : self.position + n - len(batch)]
            self.position += len(taken)
            batch += taken
        return batch

    def give_back(self, rows: Sequence[int]) -> None:
        """Rows of the last batches that were not used, in the order in which they were taken."""
        self.returned = [*rows, *self.returned]

    @property
    def rows_taken(self) -> int:
        """Over all epochs, without those given back."""
        return self.epoch * self.num_problems + self.position - len(self.returned)

    def state_dict(self) -> dict[str, Any]:
        keys = ("num_problems", "seed", "shuffle", "epoch", "position", "returned")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: It belongs to another order: other rows, another seed or other shuffling.
        """
        for key in ("num_problems", "seed", "shuffle"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"the checkpoint was trained with {key}={state[key]}, this run has {getattr(self, key)}; "
                    "the order of problems cannot be continued"
                )
        self.epoch, self.position, self.returned = state["epoch"], state["position"], list(state.get("returned", []))
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = list(range(self.num_problems))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order
