"""Real runs that the tests of this folder share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SETTINGS = {
    "dataset_prompt_column": "question", "dataset_solution_column": "answer", "system_prompt": "null",
    "use_cpu": True, "bf16": False, "use_vllm": False, "num_drafts": 3, "num_generations": 4, "temperature": 1.0,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 10,
    "reward_funcs": "[tests.support.reward_functions:low_bytes, format]", "gradient_checkpointing": False,
    "max_steps": 3, "save_steps": 0, "draft_template": " [{draft}]", "eval_samples": 4, "beta": 0.01,
    "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    """GRPO, and iGRPO with two seeds: the program itself, in one process to import once."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"{EVIL} {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = SETTINGS | {"model_name_or_path": save_tiny(folder / "model"), "dataset_name": folder / "q.jsonl"}
    commands = []
    for name, algorithm, seed in (("grpo", "grpo", 1), ("igrpo-1", "igrpo", 1), ("igrpo-2", "igrpo", 2)):
        options = common | {"algorithm": algorithm, "seed": seed, "output_dir": folder / name}
        options["report_to"] = "tensorboard" if name == "igrpo-1" else "none"
        commands.append([word for key, value in options.items() for word in (f"--{key}", str(value))])
    code = "import sys, json; from igrpo.train import main; sys.exit(max(main(c) for c in json.loads(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [folder / name for name in ("grpo", "igrpo-1", "igrpo-2")]
