"""The folder of a run: config, metrics, completions, checkpoints. Nothing in it is ever half-written or overwritten."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from igrpo.data_types import RolloutGroup, Scored
from igrpo.log_lines import Broken, read_lines
from igrpo.run.checkpoints import (
    HASHES,
    PREFIX,
    checkpoints,
    files_of,
    hashes,
    locate_checkpoint,
    place,
    read_manifest,
    step_of,
    write_manifest,
)
from igrpo.run.config import RunConfig
from igrpo.run.output_folder import (
    HEADER,
    LOGS,
    OWN,
    STOP_FILE,
    DiskFullError,
    disk_is_full,
    free_name,
    is_in,
    is_run,
    set_aside,
)
from igrpo.settings.yaml_text import dump_yaml

logger = logging.getLogger(__name__)

_SAVING, _REMOVING = f".{OWN}saving-", f".{OWN}removing-"
"""What a checkpoint is called before it is whole, and while it goes; no reader takes these for one."""
_UNFINISHED = f".{OWN}{{}}.tmp"
"""What any other file is called before it is whole."""


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

    Raises:
        ConfigError: an earlier run cannot be moved.
    """

    def __init__(self, config: RunConfig, resumed_step: int | None, processes: Processes):
        self.path = Path(config.output_dir).expanduser()
        self.limit = config.save_total_limit
        self.processes = processes
        self.set_aside: Path | None = None
        self.run = uuid.uuid4().hex
        if not processes.is_main_process:
            return
        resumed = locate_checkpoint(config) if resumed_step is not None else None
        if resumed is not None and not is_in(self.path, resumed):
            resumed_step = None
        if resumed_step is None:
            self.set_aside = set_aside(self.path)
        else:
            manifest = read_manifest(resumed) if resumed is not None else None
            self.run = manifest["run"] if manifest else self.run
            _abandon_after(self.path, resumed_step)
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.path.glob(f"{_SAVING}*"), *self.path.glob(f"{_REMOVING}*")):
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while it saved or made room
        for leftover in self.path.glob(_UNFINISHED.format("*")):
            leftover.unlink()
        for name in LOGS:
            if resumed_step is not None:
                _drop_lines_after(self.path / name, resumed_step)
        (self.path / STOP_FILE).unlink(missing_ok=True)
        if (self.path / "config.yaml").exists() and not is_run(self.path):  # somebody's, or broken
            os.rename(self.path / "config.yaml", free_name(self.path / "config.yaml.old"))
        write_atomically(self.path / "config.yaml", HEADER + dump_yaml(config))

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
        """``write`` (in every process) fills a hidden folder, which gets its manifest, then its name in one rename.

        Raises:
            DiskFullError: nothing of the checkpoint is left; the ones before it are whole.
        """
        staging, target = self.path / f"{_SAVING}{PREFIX}{step}", self.path / f"{PREFIX}{step}"
        try:
            write(staging)
            self._write_manifest(staging, step)
        except Exception as error:  # each library that writes has an exception of its own for a full disk
            if not disk_is_full(error, self.path):
                raise
            written = sum(f.stat().st_size for f in staging.rglob("*") if f.is_file())
            shutil.rmtree(staging, ignore_errors=True)
            raise DiskFullError(
                f"the disk of {self.path} was full after {written / 2**30:.2f} GiB of checkpoint {step}; make room, or "
                "write save_total_limit: 1 to keep only the last checkpoint"
            ) from error
        if self.processes.is_main_process:
            if os.path.lexists(target):
                os.rename(target, free_name(self.path / f"abandoned-{target.name}"))
            os.replace(staging, target)
            _sync(self.path)
            self._make_room(target)
        self.processes.wait_for_everyone()  # no process goes on to look for a checkpoint that has no name yet
        return target

    def _write_manifest(self, staging: Path, step: int) -> None:
        """Each process reads its share of the files again, from the disk's cache, and says what they hash to."""
        rank, processes = place()
        self.processes.wait_for_everyone()
        found = hashes(staging, files_of(staging)[rank::processes])
        if rank:
            (staging / f"{HASHES}{rank}").write_text(json.dumps(found), encoding="utf-8")
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            for other in range(1, processes):
                part = staging / f"{HASHES}{other}"
                found |= json.loads(part.read_text(encoding="utf-8"))
                part.unlink()
            _sync_to_disk(staging)
            write_manifest(staging, self.run, step, processes, found)

    def _make_room(self, newest: Path) -> None:
        """Removes this run's oldest checkpoints. They lose their name first: what has one is whole."""
        if self.limit is None:
            return
        own = [
            c for c in checkpoints(self.path) if not c.is_symlink() and (read_manifest(c) or {}).get("run") == self.run
        ]
        for old in own[: -self.limit]:
            if old != newest:
                going = free_name(self.path / f"{_REMOVING}{old.name}")
                os.rename(old, going)
                shutil.rmtree(going, ignore_errors=True)

    def asked_to_stop(self) -> bool:
        """Whether a ``STOP_FILE`` has been written since the last call. torchrun, and so accelerate, kills
        processes half a minute after a signal, less than a step may take; this waits for the step."""
        if not self.processes.is_main_process or not (self.path / STOP_FILE).is_file():
            return False
        (self.path / STOP_FILE).unlink()
        return True

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        # Half a character, which UTF-8 cannot hold, is written as JSON escapes it.
        with open(self.path / name, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_atomically(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when it is whole; one that did not become so goes."""
    staging = path.with_name(_UNFINISHED.format(path.name))
    try:
        with open(staging, "wb") as file:
            yield file
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _abandon_after(folder: Path, step: int) -> None:
    """Checkpoints of a future that this run goes another way than: kept, but neither the last one nor pruned."""
    for checkpoint in checkpoints(folder):
        if (step_of(checkpoint) or 0) > step:
            os.rename(checkpoint, free_name(folder / f"abandoned-{checkpoint.name}"))


def _drop_lines_after(path: Path, step: int) -> None:
    """The steps after the checkpoint will run again. A cut end goes too; a broken line among those that stay is named
    and stays, since whoever reads the log leaves it out."""
    if not path.is_file():
        return
    broken, unsure = Broken(path), []
    with replaced(path) as file:
        for line in read_lines(path):
            if line.step is None:
                unsure.append(line)
            elif line.step <= step:
                file.writelines(one.raw if one.whole else one.raw + b"\n" for one in (*unsure, line))
                for one in unsure:
                    broken.add(one)
                unsure.clear()
    for sentence in broken.sentences():
        logger.warning(sentence)


def _sync_to_disk(folder: Path) -> None:
    """Contents before the name: after a power cut the renamed folder must not hold empty files."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # not every file system can do that with a folder
        if not path.is_dir():
            raise error
    finally:
        os.close(descriptor)


def group_record(step: int, group: RolloutGroup) -> dict[str, Any]:
    """Question, drafts, the chosen one, refinements with rewards and advantages; whose weights sampled each."""
    return {
        "step": step,
        "row": group.problem.index,
        "prompt": group.problem.prompt,
        "solution": group.problem.solution,
        **({"observation": group.problem.observation} if group.problem.observation else {}),
        "drafts": [{**scored_record(s), **_versions(s)} for s in group.drafts],
        "chosen": group.chosen,
        **({"shown": list(group.shown)} if len(group.shown) > 1 else {}),
        "refinements": [
            {**scored_record(s), **_versions(s), "advantage": a}
            for s, a in zip(group.refinements, group.advantages, strict=True)
        ],
    }


def _versions(scored: Scored) -> dict[str, Any]:
    completion = scored.completion
    runs = {"versions": [list(run) for run in completion.versions]} if len(completion.versions) > 1 else {}
    return {"version": completion.version, **runs}


def scored_record(scored: Scored) -> dict[str, Any]:
    completion, trajectory = scored.completion, scored.completion.trajectory
    return {
        "text": completion.text,
        "reward": scored.reward,
        "rewards": scored.rewards,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        **({key: getattr(trajectory, key) for key in ("calls", "failures", "ended")} if trajectory is not None else {}),
    }


def table_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A group's completions as rows of one table, whose columns are TRL's and the stage; of ``group_record``."""
    told = {"step": record["step"], "prompt": record["prompt"]}
    return [
        {**told, "stage": stage, "completion": one["text"], **one["rewards"], "reward": one["reward"],
         "advantage": one.get("advantage"), "tokens": one["tokens"]}
        for stage, all_of_them in (("draft", record["drafts"]), ("refinement", record["refinements"]))
        for one in all_of_them
    ]  # fmt: skip
