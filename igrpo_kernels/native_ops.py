"""The compiled operators (`torch.ops.igrpo`, csrc/): loading them, and their fake kernels.

Shared by impl="cpu" and impl="cuda": one set of schemas, one implementation per device. `native_rows.py` calls them.
"""

import functools
from pathlib import Path

import torch

from igrpo_kernels.source_hash import source_hash

_BUILD = "`pip install --no-deps --no-build-isolation -e .` in the source folder builds it"
_HASH_OPERATOR = {"_C_cpu": "source_hash", "_C_cuda": "cuda_source_hash"}


@functools.cache
def missing_library(name: str) -> str | None:
    """Loads igrpo_kernels/<name>.so once; None when its operators are there, else why not and what to do."""
    path = Path(__file__).parent / f"{name}.so"
    if not path.is_file():
        return f"{path.name} is not built (no compiler, or IGRPO_SKIP_EXT=1); {_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error.__cause__ or error}); {_BUILD} again for this torch"
    sources, built = source_hash(name), getattr(torch.ops.igrpo, _HASH_OPERATOR[name])()
    if sources is not None and sources != built:
        return f"{path.name} was built from other sources than the ones in csrc/; {_BUILD} again"
    if name == "_C_cpu":
        _register_fake_kernels()
    return None


@functools.cache  # torch 2.11 refuses a second registration
def _register_fake_kernels() -> None:
    def stats(logits, *_):
        n = logits.shape[0] * logits.shape[1]
        return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))

    def loss_rows(logits, *_):
        n = logits.shape[0] * logits.shape[1]
        return tuple(logits.new_empty((n,), dtype=torch.float32) for _ in range(3))

    def gradient(logits, *_):
        return logits.new_empty(logits.shape)

    torch.library.register_fake("igrpo::row_stats", stats)
    torch.library.register_fake("igrpo::row_grad", gradient)
    torch.library.register_fake("igrpo::row_grad_", lambda *_: None)
    torch.library.register_fake("igrpo::token_loss", lambda logits, *_: (*loss_rows(logits), gradient(logits)))
    torch.library.register_fake("igrpo::token_loss_", loss_rows)
    torch.library.register_fake("igrpo::scale_", lambda *_: None)
