"""What `make train` trains, by the device that .venv was set up for; one line says what was chosen.

On a GPU recipes/quickstart-gpu.yaml, whose model of 1.5B parameters is downloaded here, where that shows its progress.
On the CPU, and on a GPU that is too small or reaches no hub, recipes/quickstart.yaml with the packaged SmolLM2-135M.

    python scripts/quickstart.py --max_steps 5          any key of the recipe can follow
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL, LARGE = "recipes/quickstart.yaml", "recipes/quickstart-gpu.yaml"
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
"""As in ``LARGE``."""
NEEDED_GIB = 40
"""Of GPU memory, for all of that model's weights with AdamW beside vLLM: `igrpo plan` says 35."""


def main() -> int:
    os.chdir(ROOT)
    device = json.loads((ROOT / ".venv" / "complete").read_text(encoding="utf-8"))["device"]
    reason = why_not_the_larger() if device == "gpu" else "the CPU"
    recipe = SMALL if reason else LARGE
    print(f"quickstart: {recipe} with {MODEL if reason is None else f'SmolLM2-135M ({reason})'}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "igrpo.train", "--config", recipe, *sys.argv[1:]])


def why_not_the_larger() -> str | None:
    """What keeps this machine from training the model of 1.5B, in words; None: it is there."""
    import torch
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import HfHubHTTPError

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < NEEDED_GIB - 1:  # a driver keeps a little of the round number for itself
        return f"{MODEL} needs {NEEDED_GIB} GiB of GPU memory, here are {memory:.0f}"
    logging.set_verbosity_error()  # it would report each of its retries
    print(f"asking the hub for {MODEL}", flush=True)
    try:
        hf_hub_download(MODEL, "model.safetensors", etag_timeout=10)
    except HfHubHTTPError.__bases__ as error:  # OSError, and those of the HTTP client that the hub's library uses
        return f"{MODEL} cannot be had from the hub, {type(error).__name__}"
    return None


if __name__ == "__main__":
    sys.exit(main())
