"""The compiled operators (`torch.ops.igrpo`, csrc/): loading them, and their fake kernels.

Shared by impl="cpu" and impl="cuda": one set of schemas, one implementation per device. `native_rows.py` calls them.
"""

import functools
import importlib.metadata
import json
from pathlib import Path

import torch

from igrpo_kernels.source_hash import source_hash

_HASH_OPERATOR = {"_C_cpu": "source_hash", "_C_cuda": "cuda_source_hash"}


@functools.cache
def missing_library(name: str) -> str | None:
    """Loads igrpo_kernels/<name>.so once; None when its operators are there, else why not and what to do."""
    path = Path(__file__).parent / f"{name}.so"
    if not path.is_file():
        lacked = "no torch, no C++ compiler" if name == "_C_cpu" else "no nvcc, or a torch without CUDA,"
        return (
            f"{path.name} is not built ({lacked} or IGRPO_SKIP_EXT=1 at the installation); {build_command()} builds it"
        )
    try:
        torch.ops.load_library(path)
        built = getattr(torch.ops.igrpo, _HASH_OPERATOR[name])()
    except (OSError, AttributeError) as error:  # another processor or torch; cut short; no operators of ours
        words = str(error.__cause__ or error).splitlines()[0]
        return f"{path.name} does not load ({words}); {build_command()} builds it again for this torch"
    sources = source_hash(name)
    if sources is not None and sources != built:
        return f"{path.name} was built from other sources than the ones in csrc/; {build_command()} builds it again"
    if name == "_C_cpu":
        _register_fake_kernels()
    return None


@functools.cache
def build_command() -> str:
    """What builds both libraries from where this package came, or stops and says why it cannot."""
    if source_hash("_C_cpu") is not None:
        return "`IGRPO_REQUIRE_EXT=1 pip install --no-deps -e .` in the source folder"
    try:
        noted = importlib.metadata.distribution("igrpo").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        noted = None
    origin = json.loads(noted) if noted else {"url": "igrpo"}
    source = origin["url"]
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{source}@{origin['vcs_info']['commit_id']}"
    # pip keeps the wheel without the libraries, too.
    options = "--force-reinstall --no-deps --no-cache-dir --no-binary igrpo"
    return f"`IGRPO_REQUIRE_EXT=1 pip install {options} '{source}'`"


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
