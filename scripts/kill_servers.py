"""Trains while killing a random server process every few steps, and checks that nothing was lost.

    python scripts/kill_servers.py --every 10 -- --config recipe.yaml --vllm_mode server --vllm_num_servers 2 ...

Prints one JSON line: exit code, kills, steps, how often each prompt was used. Ends with 0 when the run ended well, each
step is there once, and no prompt of an epoch is missing or doubled.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=10, help="steps between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and the arguments of igrpo.train")
    options = parser.parse_args()
    arguments = [word for word in options.arguments if word != "--"]
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    trainer = subprocess.Popen([sys.executable, "-m", "igrpo.train", *arguments])
    start, kills, chance = time.monotonic(), 0, random.Random(options.seed)
    while trainer.poll() is None:
        time.sleep(0.2)
        if len(records(folder, "metrics.jsonl")) >= (kills + 1) * options.every and (
            victims := server_processes(trainer)
        ):
            chance.choice(victims).kill()
            kills += 1
    steps = [record for record in records(folder, "metrics.jsonl") if "reward" in record]
    rows = Counter(group["row"] for group in records(folder, "completions.jsonl"))
    report = {
        "exit_code": trainer.returncode,
        "kills": kills,
        "restarts": steps[-1]["sync/restarts"] if steps else None,
        "steps": len(steps),
        "epochs": steps[-1]["epoch"] if steps else None,
        "prompts": len(rows),
        "uses_per_prompt": sorted(set(rows.values())),
        "largest_probe_gap": max((step["sync/probe_logp_gap"] for step in steps), default=None),
        "seconds": round(time.monotonic() - start),
    }
    print(json.dumps(report))
    in_order = [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    even = len(rows) > 0 and max(rows.values()) - min(rows.values()) <= 1
    return 0 if trainer.returncode == 0 and in_order and even else 1


def records(folder: Path, name: str) -> list[dict]:
    path = folder / name
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def server_processes(trainer: subprocess.Popen) -> list[psutil.Process]:
    """Front ends and engines of all servers that the trainer runs."""
    try:
        everyone = psutil.Process(trainer.pid).children(recursive=True)
        fronts = [
            p for p in everyone if "vllm.entrypoints.openai.api_server" in p.cmdline() and p.ppid() != trainer.pid
        ]
        return [q for front in fronts for q in (front, *front.children()) if "resource_tracker" not in str(q.cmdline())]
    except psutil.NoSuchProcess:  # one ended while we looked; next time
        return []


if __name__ == "__main__":
    sys.exit(main())
