"""The files of an evaluation: one line per problem, appended when its scores are in, so that a kill loses none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from igrpo.data_types import Problem, Scored
from igrpo.log_lines import read_records
from igrpo.run.folder import scored_record, write_atomically
from igrpo.settings import ConfigError

logger = logging.getLogger(__name__)

SETTINGS = "settings.yaml"


def weights_stamp(model: str) -> str | None:
    """Changes when a folder's weights do (names, sizes, times of writing); None for a hub id."""
    files = sorted(p for p in Path(model).glob("*") if p.suffix in (".safetensors", ".bin"))
    if not files:
        return None
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def open_folder(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Creates the folder, or checks that it holds an evaluation with the same settings, to be continued.

    Args:
        defaults: stand for what a folder does not tell, which a version made that kept fewer settings.

    Raises:
        ConfigError: it holds another one.
    """
    path = folder / SETTINGS
    if path.is_file():
        earlier = defaults | _settings(path)
        if changed := [key for key in settings if earlier.get(key) != settings[key]]:
            what = ", ".join(f"{key} ({earlier.get(key)!r}, now {settings[key]!r})"[:200] for key in changed)
            raise ConfigError(
                f"output_dir: {folder} holds an evaluation with another {what}; write another --output_dir, or remove "
                "that folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"output_dir: {path} cannot be read; remove {path.parent}, or write another --output_dir")
    return found


class Records:
    """The records of one benchmark, by row; a line that a kill cut is dropped when the file is opened.

    Args:
        n: Completions that every record must have.
        rewards: Names of the reward functions that scored them.

    Raises:
        ConfigError: the file's questions, its n or its rewards are not those of this evaluation.
    """

    def __init__(self, path: Path, problems: Sequence[Problem], n: int, rewards: Sequence[str]):
        self.path, self.n, self.rewards = path, n, list(rewards)
        self.by_row: dict[int, dict[str, Any]] = {}
        for record in self._read():
            self.by_row.setdefault(record["row"], record)
        for problem in problems:
            self._check(problem)
        if path.is_file():
            self.rewrite()

    def _read(self) -> Iterator[dict[str, Any]]:
        """Whole records; problems of those that are broken, which are named, are sampled again."""
        notes: list[str] = []
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ConfigError(f"output_dir: {self.path} is no file; move it away, or write another --output_dir")
        odd = 0
        for record in read_records(self.path, notes):
            if _fits(record):
                yield record
            else:
                odd += 1
        if odd:
            notes.append(f"{self.path}: {odd} records of another shape were left out")
        for note in notes:
            logger.warning(note)

    def missing(self, problems: Sequence[Problem]) -> list[Problem]:
        return [problem for problem in problems if problem.index not in self.by_row]

    def add(self, record: dict[str, Any]) -> None:
        self.by_row[record["row"]] = record
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def of(self, problems: Sequence[Problem]) -> list[dict[str, Any]]:
        return [self.by_row[problem.index] for problem in problems]

    def rewrite(self) -> None:
        """In the order of the rows: the order in which they finished says nothing."""
        write_atomically(self.path, "".join(_line(self.by_row[row]) for row in sorted(self.by_row)))

    def _check(self, problem: Problem) -> None:
        record = self.by_row.get(problem.index)
        if record is None:
            return
        if record["prompt"] != _plain(problem.prompt) or record["solution"] != problem.solution:
            raise ConfigError(
                f"output_dir: {self.path} was made from other rows (row {problem.index} differs); write another "
                "--output_dir"
            )
        if len(record["completions"]) != self.n:
            raise ConfigError(
                f"output_dir: {self.path} has {len(record['completions'])} completions per problem, not n = {self.n}; "
                "write another --output_dir"
            )
        if (scored_by := list(record["completions"][0]["rewards"])) != self.rewards:
            raise ConfigError(
                f"output_dir: {self.path} was scored by {', '.join(scored_by)}, not by {', '.join(self.rewards)}; "
                "write another --output_dir"
            )


def make_record(problem: Problem, scored: Sequence[Scored], judge: str, with_ids: bool) -> dict[str, Any]:
    """One problem with its completions; ``correct`` is None where the reference answer cannot be read."""
    scores = [s.rewards[judge] for s in scored]
    completions = [scored_record(s) for s in scored]
    if with_ids:  # a draft enters the second stage's prompt as the ids that were sampled
        for completion, s in zip(completions, scored, strict=True):
            completion["token_ids"] = list(s.completion.token_ids)
            completion |= {"spans": list(s.completion.spans)} if s.completion.spans else {}
    return {
        "row": problem.index,
        "prompt": _plain(problem.prompt),
        "solution": problem.solution,
        "correct": None if None in scores else sum(score >= 1.0 for score in scores if score is not None),
        "score": None if None in scores else sum(score for score in scores if score is not None) / len(scores),
        "completions": completions,
    }


def _fits(record: dict[str, Any]) -> bool:
    """Whether it has what is read of one."""
    completions = record.get("completions")
    if type(record.get("row")) is not int or not {"prompt", "solution", "correct", "score"} <= record.keys():
        return False
    if not isinstance(completions, list) or not completions:
        return False
    return all(isinstance(c, dict) and isinstance(c.get("rewards"), dict) and "text" in c for c in completions)


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
