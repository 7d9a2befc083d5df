"""Whether ``output_dir`` can hold a run, asked before anything heavy is loaded, and how an earlier run makes room.

A run touches what runs wrote: names that the program knows, in a folder whose ``config.yaml`` or checkpoints say that
it is one of ours. Whatever else lies there is named and left alone.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

import yaml

from igrpo.run.checkpoints import LAST, PREFIX, checkpoints, is_ours, step_of
from igrpo.run.config import RunConfig
from igrpo.run.lock import locked
from igrpo.settings import ConfigError
from igrpo.terminal import printable

HEADER = "# Written by igrpo: the settings of the run whose folder this is.\n"
"""First line of a run's config.yaml."""
LOGS = ("metrics.jsonl", "completions.jsonl", "timeline.jsonl")
STOP_FILE = "stop"
"""Whoever writes a file of this name into the folder of a run stops it after the step, with a checkpoint."""
OWN = "igrpo-"
"""Hidden names that begin with this are the program's, and may be removed when it starts again."""
_WRITTEN = (
    "config.yaml",
    *LOGS,
    "timeline.png",
    "report.html",
    "report_figures",
    "igrpo",
    "faults.json",
    "core_seconds",
)
"""What runs, reports, trackers (the folder ``igrpo``) and our scripts leave."""
_EARLIER = "earlier-run-"
_TOLERATED_FOLDERS = (".*", "lost+found", f"{_EARLIER}*")
_TOLERATED_FILES = (".*", STOP_FILE, "core_seconds", "*.log", "*.out", "*.err")
"""Of others, launchers for example, or of runs before; no reason not to begin. They stay where they are."""
_OLDER_KEYS = {"model_name_or_path", "dataset_name", "num_drafts", "draft_template"}
"""config.yaml of a version that wrote no header."""
_OLD_CONFIG = re.compile(r"config\.yaml\.old(\.\d+)?")
_CHECKPOINT = re.compile(rf"(abandoned-)?{PREFIX}\d+(\.\d+)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHOWN = 5
ALMOST_NOTHING = 16 * 2**20
"""Bytes; a disk with less is full."""
LONGEST = 3800
"""Bytes of a path; the system's limit is 4,096, and a checkpoint's files have names of their own."""


class DiskFullError(RuntimeError):
    """What was to be written did not fit."""


@contextmanager
def claimed(config: RunConfig, main_process: bool) -> Iterator[None]:
    """Checks the folder and, in the main process, holds it against other runs until the end. Folders that were made
    for this and are empty at the end go again.

    Raises:
        ConfigError: it cannot hold this run, or another run holds it; nothing has been written.
        DiskFullError: there is no room at all.
    """
    with refused(config.output_dir):
        folder = usable(config.output_dir)
        _check_contents(folder, _resumes_here(config, folder))
    if not main_process:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with ExitStack() as stack:
            with refused(config.output_dir):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
            yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def is_in(folder: Path, checkpoint: Path) -> bool:
    """Whether the checkpoint, or the link to it, stands in the folder."""
    return os.path.realpath(checkpoint.absolute().parent) == os.path.realpath(folder)


def is_run(folder: Path) -> bool:
    """Whether the folder's config.yaml was written by a run of this program."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        if text.startswith(HEADER):
            return True
        values = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= _OLDER_KEYS


def set_aside(folder: Path) -> Path | None:
    """Moves an earlier run's files to a new folder beside this one, or inside it where they cannot leave it: this one
    stays, as it may be a link's target or a mount point. None where there is no earlier run.

    Raises:
        ConfigError: they cannot be moved.
    """
    there = folder.resolve()
    if not there.is_dir() or not (is_run(there) or checkpoints(there)):
        return None
    # What says that the folder is a run's goes last: a move that is killed goes on the next time.
    written = (name for name in os.listdir(there) if _written(there / name))
    names = sorted(written, key=lambda name: name == "config.yaml")
    dated = there / "config.yaml" if (there / "config.yaml").exists() else there
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(dated.stat().st_mtime))
    reason = ""
    for wanted in (there.with_name(f"{there.name}-{stamp}") if there.name else there, there / f"{_EARLIER}{stamp}"):
        try:
            target = free_name(wanted)
            target.mkdir()
        except OSError as error:  # nothing can be made there, or no longer name
            reason = error.strerror
            continue
        try:
            for name in names:
                os.rename(there / name, target / name)
            return target
        except OSError as error:  # another file system; what was moved before is found again where it was
            reason = error.strerror
            for name in os.listdir(target):
                os.rename(target / name, there / name)
            target.rmdir()
    raise ConfigError(f"output_dir: the earlier run in {folder} cannot be moved ({reason}); write another output_dir")


def free_name(wanted: Path) -> Path:
    others = (wanted.with_name(f"{wanted.name}.{i}") for i in count(1))
    return wanted if not os.path.lexists(wanted) else next(path for path in others if not os.path.lexists(path))


def disk_is_full(error: Exception, path: Path) -> bool:
    """Whether an error means that the disk is full.

    torch and safetensors lose the system's error number, so a disk with hardly any room left counts as well.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    said = os.strerror(errno.ENOSPC) in str(error)
    return said or (path.exists() and shutil.disk_usage(path).free < ALMOST_NOTHING)


def concerns(error: OSError, folder: Path) -> bool:
    """Whether the system speaks of a file in the folder: of a log that it can write no more, for example."""
    name = error.filename
    return isinstance(name, str) and Path(os.path.realpath(name)).is_relative_to(os.path.realpath(folder))


def usable(text: str) -> Path:
    """The folder, if it is one or can be made.

    Raises:
        ConfigError: neither.
    """
    if not text.strip():
        raise ConfigError("output_dir: it is empty; write the folder of the run, for example runs/first")
    _check_text("output_dir", text)
    try:
        folder = Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"output_dir: {_short(text)}: there is no such user; write the whole path") from None
    if len(os.fsencode(folder.absolute())) > LONGEST:
        raise ConfigError(f"output_dir: {_short(text)} is too long for the files of a run; write a shorter path")
    for path in (folder, *folder.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise ConfigError(
                f"output_dir: {_short(str(path))} is a link to {_short(os.readlink(path))}, which is not there; make "
                "that folder, or write another output_dir"
            )
        if not os.path.lexists(path):
            continue
        if not path.is_dir():
            raise ConfigError(f"output_dir: {_short(str(path))} is a file, no folder; write another output_dir")
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir: {_short(str(path))} cannot be written; write another output_dir")
        break
    return folder


def _check_text(key: str, text: str) -> None:
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise ConfigError(f"{key}: {_short(text)} holds characters that are no text; write another name")


def _check_contents(folder: Path, resumes: bool) -> None:
    if not folder.exists():
        return
    for name in ("config.yaml", *LOGS, STOP_FILE):
        path = folder / name
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            raise ConfigError(f"output_dir: {path} is no file that a run can read and write; move it away")
    names = sorted(os.listdir(folder))
    if resumes:  # which touches nothing else
        strange = [name for name in names if step_of(folder / name) is not None and not is_ours(folder / name)]
    else:
        ours = is_run(folder) or bool(checkpoints(folder))
        strange = [name for name in names if not _tolerated(folder / name) and not (ours and _written(folder / name))]
    if strange:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise ConfigError(
            f"output_dir: {_short(str(folder))} holds {', '.join(map(_short, strange[:_SHOWN]))}{more}, which no run "
            "of this program wrote; write another output_dir, or move that away"
        )


def _resumes_here(config: RunConfig, folder: Path) -> bool:
    asked = config.resume_from_checkpoint
    if asked is None or asked in LAST:
        return asked is not None
    _check_text("resume_from_checkpoint", asked)
    return is_in(folder, Path(os.path.expanduser(asked)))


def _written(path: Path) -> bool:
    """In a folder of ours: whether a run wrote it."""
    if path.name in _WRITTEN or _OLD_CONFIG.fullmatch(path.name):
        return True
    return _CHECKPOINT.fullmatch(path.name) is not None and is_ours(path)


def _tolerated(path: Path) -> bool:
    patterns = _TOLERATED_FOLDERS if path.is_dir() else _TOLERATED_FILES
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


@contextmanager
def refused(text: str) -> Iterator[None]:
    """What the system says of the folder becomes a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"output_dir: there is no room in {_short(text)} ({error.strerror})") from error
        raise ConfigError(
            f"output_dir: {_short(text)} cannot be used ({error.strerror}); write another output_dir"
        ) from error


def _short(text: str) -> str:
    """Of one line, whatever a file's name holds."""
    return printable(text, limit=120)
