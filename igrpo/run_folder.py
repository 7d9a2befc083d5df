"""The folder of a run: config, metrics, completions, checkpoints. Nothing in it is ever half-written or overwritten."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from igrpo.config import ConfigError, TrainConfig
from igrpo.config_file import dump_yaml
from igrpo.types import RolloutGroup, Scored

_PREFIX = "checkpoint-"
STOP_FILE = "stop"
"""Whoever writes a file of this name into the folder of a run stops it after the step, with a checkpoint."""
ALMOST_NOTHING = 16 * 2**20
"""Bytes; a disk with less is full."""


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        ConfigError: one was asked for and is not there.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    if asked in ("last", "latest", "true"):
        found = checkpoints(Path(config.output_dir))
        if not found:
            raise ConfigError(f"resume_from_checkpoint: {config.output_dir} has no checkpoint yet; leave the key out")
        return found[-1]
    folder = Path(asked).expanduser()
    if not (folder / "state" / "loop.pt").is_file():
        raise ConfigError(f"resume_from_checkpoint: {asked} is no checkpoint folder (no state/loop.pt inside)")
    return folder


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(_PREFIX) :]))


class DiskFullError(RuntimeError):
    """What was to be written did not fit."""


class Processes(Protocol):
    """The part of ``accelerate.Accelerator`` that a folder shared by several processes needs."""

    is_main_process: bool

    def wait_for_everyone(self) -> None: ...


class RunFolder:
    """Opens the folder: a new run sets an earlier one aside, a resumed run drops lines past its checkpoint and keeps
    later checkpoints under another name.

    Args:
        resumed_step: the checkpoint's step, or None for a new run. One of another folder's begins a new run here.
        processes: of the run; only the main one changes the folder.
    """

    def __init__(self, config: TrainConfig, resumed_step: int | None, processes: Processes):
        self.path = Path(config.output_dir).expanduser()
        self.limit = config.save_total_limit
        self.processes = processes
        self.set_aside: Path | None = None
        if not processes.is_main_process:
            return
        if resumed_step is not None and not _is_of(self.path, find_checkpoint(config)):
            resumed_step = None
        if resumed_step is None:
            self.set_aside = _set_aside(self.path)
        else:
            _abandon_after(self.path, resumed_step)
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f".{_PREFIX}*"):  # of a run that was killed while saving
            shutil.rmtree(leftover, ignore_errors=True)
        for name in ("metrics.jsonl", "completions.jsonl", "timeline.jsonl"):
            if resumed_step is not None:
                _drop_lines_after(self.path / name, resumed_step)
        (self.path / STOP_FILE).unlink(missing_ok=True)
        write_atomically(self.path / "config.yaml", dump_yaml(config))

    def log_metrics(self, step: int, metrics: dict[str, float], messages: Sequence[str] = ()) -> None:
        """Args:
        messages: warnings since the last line, which stand beside the figures where there are any.
        """
        said = {"messages": list(messages)} if messages else {}
        self._append("metrics.jsonl", [{"step": step, **metrics, **said}])

    def log_completions(self, records: Iterable[dict[str, Any]]) -> None:
        """One line per problem: a ``group_record``."""
        self._append("completions.jsonl", list(records))

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """``write`` (in every process) fills a hidden folder, which then gets its name in one rename.

        Raises:
            DiskFullError: nothing of the checkpoint is left; the ones before it are whole.
        """
        staging, target = self.path / f".{_PREFIX}{step}", self.path / f"{_PREFIX}{step}"
        try:
            write(staging)
        except Exception as error:  # each library that writes has an exception of its own for a full disk
            if not disk_is_full(error, self.path):
                raise
            written = sum(f.stat().st_size for f in staging.rglob("*") if f.is_file())
            shutil.rmtree(staging, ignore_errors=True)
            raise DiskFullError(
                f"the disk of {self.path} was full after {written / 2**30:.2f} GiB of checkpoint {step}; make room, or "
                "write save_total_limit: 1 to keep only the last checkpoint"
            ) from error
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            _sync_to_disk(staging)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staging, target)
            if self.limit is not None:
                for old in checkpoints(self.path)[: -self.limit]:
                    if old != target:
                        shutil.rmtree(old, ignore_errors=True)
        self.processes.wait_for_everyone()  # no process goes on to look for a checkpoint that has no name yet
        return target

    def asked_to_stop(self) -> bool:
        """Whether a ``STOP_FILE`` has been written since the last call. torchrun, and so accelerate, kills
        processes half a minute after a signal, less than a step may take; this waits for the step."""
        if not self.processes.is_main_process or not (self.path / STOP_FILE).exists():
            return False
        (self.path / STOP_FILE).unlink()
        return True

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_atomically(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def whole_lines(path: Path) -> list[str]:
    """Without one that a kill cut short. Not ``splitlines``: a completion may hold what that takes for a line's end,
    U+2028 for example."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line for line in file if line.endswith("\n")]


def disk_is_full(error: Exception, path: Path) -> bool:
    """torch and safetensors do not keep the system's error number, so what is left on the disk says it too."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    said = os.strerror(errno.ENOSPC) in str(error)
    return said or (path.exists() and shutil.disk_usage(path).free < ALMOST_NOTHING)


def _set_aside(path: Path) -> Path | None:
    """Renames a folder that holds an earlier run; an empty or foreign folder stays."""
    if not (path / "config.yaml").is_file():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime((path / "config.yaml").stat().st_mtime))
    target = _free_name(path.with_name(f"{path.name}-{stamp}"))
    os.rename(path, target)
    return target


def _is_of(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is None or checkpoint.resolve().parent == folder.resolve()


def _abandon_after(folder: Path, step: int) -> None:
    """Checkpoints of a future that this run goes another way than: kept, but neither the last one nor pruned."""
    for checkpoint in checkpoints(folder):
        if int(checkpoint.name[len(_PREFIX) :]) > step:
            os.rename(checkpoint, _free_name(folder / f"abandoned-{checkpoint.name}"))


def _free_name(wanted: Path) -> Path:
    others = (wanted.with_name(f"{wanted.name}.{i}") for i in count(1))
    return wanted if not wanted.exists() else next(path for path in others if not path.exists())


def _drop_lines_after(path: Path, step: int) -> None:
    """The steps after the checkpoint will run again; a line cut by a kill goes too."""
    if not path.is_file():
        return
    kept = []
    for line in whole_lines(path):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    write_atomically(path, "".join(kept))


def _sync_to_disk(folder: Path) -> None:
    """Contents before the name: after a power cut the renamed folder must not hold empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def group_record(step: int, group: RolloutGroup) -> dict[str, Any]:
    """Question, drafts, the chosen one, refinements with rewards and advantages; whose weights sampled each."""
    return {
        "step": step,
        "row": group.problem.index,
        "prompt": group.problem.prompt,
        "solution": group.problem.solution,
        "drafts": [{**scored_record(s), "version": s.completion.version} for s in group.drafts],
        "chosen": group.chosen,
        "refinements": [
            {**scored_record(s), "version": s.completion.version, "advantage": a}
            for s, a in zip(group.refinements, group.advantages, strict=True)
        ],
    }


def scored_record(scored: Scored) -> dict[str, Any]:
    completion = scored.completion
    return {
        "text": completion.text,
        "reward": scored.reward,
        "rewards": scored.rewards,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
