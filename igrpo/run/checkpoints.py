"""Which folders are checkpoints of ours, and whether they are whole: each has a manifest of its files, written last.

``igrpo-checkpoint.json`` marks a checkpoint as written by this program and holds the size and hash of every file in
it. It finds what a disk or a copy has broken. It is no signature: whoever can write the files can write it too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from igrpo.run.config import RunConfig
from igrpo.settings import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "igrpo-checkpoint.json"
LAST = ("last", "latest", "true")
"""Words of ``resume_from_checkpoint`` for the newest one in ``output_dir``."""
HASHES = ".igrpo-hashes-"
"""Files in which processes tell the main one their share of the hashes."""
PIECE = 2**26
"""Bytes hashed at a time, so that one large file keeps all cores busy. A file's hash is that of its pieces' hashes."""
THREADS = min(8, os.cpu_count() or 1)
_NUMBER = re.compile(rf"{PREFIX}(0|[1-9][0-9]{{0,17}})")
_OLDER = "state/custom_checkpoint_0.pkl"
"""Only checkpoints of a version without manifests have it."""


def step_of(folder: Path) -> int | None:
    """The number in a checkpoint's name, None for any other name."""
    found = _NUMBER.fullmatch(folder.name)
    return int(found[1]) if found else None


def is_ours(folder: Path) -> bool:
    """Whether this program wrote the checkpoint."""
    return os.path.isfile(folder / MANIFEST) or os.path.isfile(folder / "state" / "loop.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Those that this program wrote, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if step_of(p) is not None and is_ours(p)]
    return sorted(found, key=lambda p: step_of(p) or 0)


def saved_models(folder: Path) -> list[Path]:
    """Those that can be evaluated, oldest first: whoever wrote them, and without the state that a run goes on from."""
    found = [p for p in folder.glob(f"{PREFIX}*") if step_of(p) is not None and os.path.isfile(p / "config.json")]
    return sorted(found, key=lambda p: step_of(p) or 0)


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to resume from, whole as far as its manifest can tell.

    Raises:
        ConfigError: one was asked for and is not there, or is damaged.
    """
    folder = locate_checkpoint(config)
    if folder is not None:
        _check(folder)
    return folder


def locate_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` names.

    Raises:
        ConfigError: one was asked for and is not there.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    if asked in LAST:
        found = checkpoints(Path(config.output_dir).expanduser())
        if not found:
            raise ConfigError(f"resume_from_checkpoint: {config.output_dir} has no checkpoint yet; leave the key out")
        return found[-1]
    folder = Path(os.path.expanduser(asked))
    if not is_ours(folder):
        raise ConfigError(
            f"resume_from_checkpoint: {asked} is no checkpoint folder ({MANIFEST} is not in it); write `last`, or the "
            "path of a checkpoint-N that `igrpo train` wrote"
        )
    return folder


def write_manifest(folder: Path, run: str, step: int, processes: int, files: dict[str, Any]) -> None:
    """Once everything else is on the disk."""
    manifest = {"igrpo_checkpoint": 1, "run": run, "step": step, "processes": processes, "files": files}
    text = json.dumps(manifest, indent=1)
    with open(folder / MANIFEST, "x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where it is not there or not one of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        fits = isinstance(manifest["run"], str) and isinstance(manifest["processes"], int)
        fits = fits and all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
        fits = fits and all(_inside(name) for name in files)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return manifest if fits else None


def files_of(folder: Path) -> list[str]:
    """Every file below that belongs into a manifest, the largest first."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith(HASHES)]
    return [p.relative_to(folder).as_posix() for p in sorted(found, key=lambda p: (-p.stat().st_size, p))]


def hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each; read in pieces, by several threads.

    Raises:
        OSError: one cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    pieces = [(name, begin) for name, size in sizes.items() for begin in range(0, max(size, 1), PIECE)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda piece: _hash_piece(folder / piece[0], piece[1]), pieces))
    whole = {name: hashlib.sha256() for name in sizes}
    for (name, _), digest in zip(pieces, digests, strict=True):
        whole[name].update(digest)
    return {name: {"bytes": sizes[name], "sha256": whole[name].hexdigest()} for name in sizes}


def damage(folder: Path, rank: int = 0, processes: int = 1) -> str | None:
    """What is wrong with a checkpoint, None where nothing is.

    Args:
        rank: which of the ``processes`` this is; each compares its share of the hashes, all of them every size.
    """
    if not (folder / MANIFEST).is_file():
        # Nothing can be compared there; what cannot be loaded is found when it is.
        return None if (folder / _OLDER).is_file() else f"{MANIFEST} is missing"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    files = manifest["files"]
    for name, written in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != written["bytes"]:
            return f"{name} has {size} bytes, {written['bytes']} were written"
    for name in list(files)[rank::processes]:
        try:
            (found,) = hashes(folder, [name]).values()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != files[name]:
            return f"{name} is not as it was written (its hash differs)"
    return None


def place() -> tuple[int, int]:
    """This process's number and that of all, as whatever launched it says and accelerate reads it."""
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    rank, processes = (next((os.environ[n] for n in names if n in os.environ), "") for names in (ranks, sizes))
    return int(rank or 0), max(int(processes or 1), 1)


def _check(folder: Path) -> None:
    rank, processes = place()
    wrong = damage(folder, rank, processes)
    if wrong is None:
        if rank == 0 and not (folder / MANIFEST).is_file():
            logger.warning("%s has no %s, as an older version wrote it: its files cannot be compared", folder, MANIFEST)
        return
    earlier = [c for c in checkpoints(folder.parent) if (step_of(c) or 0) < (step_of(folder) or 0)]
    whole = next((c for c in reversed(earlier) if damage(c) is None), None)
    advice = "no checkpoint before it is whole: start the run again, in another output_dir"
    if whole is not None:
        advice = f"{whole.name} is whole: write --resume_from_checkpoint {whole}"
    raise ConfigError(f"resume_from_checkpoint: {folder} is damaged: {wrong}; {advice}")


def _inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name


def _hash_piece(path: Path, begin: int) -> bytes:
    found, left = hashlib.sha256(), PIECE
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while left and (block := file.read(min(left, 2**20))):
            found.update(block)
            left -= len(block)
    return found.digest()
