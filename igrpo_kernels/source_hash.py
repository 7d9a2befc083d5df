"""Which sources a compiled library was built from. Standard library only: setup.py runs this file by its path."""

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
_OTHER = {"_C_cpu": "cuda", "_C_cuda": "cpu"}  # the folder a library has nothing of


def source_hash(library: str, csrc: Path = CSRC) -> str | None:
    """Hash of the library's files under csrc/, or None where the sources are not there (an installed wheel)."""
    if not (csrc / "token_objective.h").is_file():  # site-packages may hold another project's csrc/
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        name = path.relative_to(csrc)
        if name.parts[0] != _OTHER[library]:
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
