"""The losses that a recipe may name: the table of `igrpo_kernels`, run by its path, since the package imports torch."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

_TABLE = runpy.run_path(str(Path(find_spec("igrpo_kernels").origin).with_name("losses.py")))  # type: ignore[union-attr,arg-type]
LOSSES = _TABLE["LOSSES"]

LossType = Literal[tuple(LOSSES)]  # type: ignore[valid-type]
Level = Literal[_TABLE["IMPORTANCE_SAMPLING_LEVELS"]]  # type: ignore[valid-type]
CorrectionMode = Literal[_TABLE["IMPORTANCE_SAMPLING_MODES"]]  # type: ignore[valid-type]
KLEstimator = Literal[_TABLE["KL_ESTIMATORS"]]  # type: ignore[valid-type]


def takes(loss_type: str, key: str) -> bool:
    """Whether a setting shapes this loss's policy term."""
    return key in LOSSES[loss_type].term.settings
