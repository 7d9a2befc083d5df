"""Trains while a random engine process or reward worker is killed every few steps, and checks that nothing was lost.

    python scripts/fault_run.py                                     100 steps, two servers, a kill every 4 steps
    python scripts/fault_run.py --every 6 --draft_policy_lag 1      other keys go to igrpo.train
    python scripts/fault_run.py --processes 2                       two learner processes share servers and problems

A tiny random model, real `vllm serve` processes. A kill is SIGKILL at a random moment: the front end or the engine of a
server that listens, or a reward worker. Prints one JSON line and writes it to faults.json in the run's folder; the exit
status is 0 when the run ended well and `complaints` finds nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = 40
KEEPER = "igrpo.rewards.workers.keeper"
"""In the command line of a reward worker and its keeper."""
SETTINGS = {
    "dataset_prompt_column": "question", "dataset_solution_column": "answer", "system_prompt": "null",
    "draft_template": "' [{draft}]'", "vllm_mode": "server", "vllm_num_servers": 2, "vllm_max_model_length": 256,
    "vllm_request_timeout": 60, "use_cpu": True, "bf16": False, "num_drafts": 3, "num_generations": 4,
    "per_device_train_batch_size": 4, "max_completion_length": 60,
    "temperature": 1.0, "learning_rate": 1e-3, "gradient_checkpointing": False, "reward_workers": 2,
    "reward_funcs": "[scripts.fault_run:low_letters]", "max_steps": 100, "save_steps": 0, "seed": 0,
}  # fmt: skip
"""Four problems a step, so that ten steps are an epoch."""


def low_letters(completions, **_) -> list[float]:
    """Share of characters below 'n'; slow enough that some workers are killed in the middle of it."""
    time.sleep(0.1)
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch < "n" for ch in text) / max(len(text), 1) for text in texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=4, help="mean number of steps between two kills")
    parser.add_argument("--kill_seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=1, help="of the learner")
    parser.add_argument("--output_dir", default="runs/faults")
    options, others = parser.parse_known_args()
    folder = Path(options.output_dir).resolve()
    settings = SETTINGS | {key.removeprefix("--"): value for key, value in zip(others[::2], others[1::2], strict=True)}
    settings |= prepare(folder) | {"output_dir": folder}
    settings["gradient_accumulation_steps"] = 4 // options.processes
    launcher = ["igrpo.train"]
    if options.processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
        launcher += ["igrpo/train.py"]
    start = time.monotonic()
    trainer = subprocess.Popen(
        [sys.executable, "-m", *launcher, *(w for k, v in settings.items() for w in (f"--{k}", str(v)))],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    everyone: set[psutil.Process] = set()
    try:
        kills, missed = kill_now_and_then(trainer, folder, options.every, random.Random(options.kill_seed), everyone)
    finally:
        trainer.terminate()
        trainer.wait()
    steps = [record for record in records(folder, "metrics.jsonl") if "reward" in record]
    groups = records(folder, "completions.jsonl")
    wrong = complaints(steps, groups, settings)
    if trainer.returncode:
        wrong.insert(0, f"the run ended with exit code {trainer.returncode}")
    wrong += [f"no {kind} was killed, although one was to be" for kind in missed]
    if left := [p for p in everyone if alive(p)]:
        wrong.append(f"{len(left)} of the run's processes live on: {left[:3]}")
    report = {
        "steps": len(steps),
        "kills": dict(kills),
        "restarts": steps[-1]["sync/restarts"] if steps else None,
        "seconds": round(time.monotonic() - start),
        "epochs": len(groups) / PROBLEMS,
        "largest_probe_gap": max((step["sync/probe_logp_gap"] for step in steps), default=None),
        "largest_sampling_gap": max((step["sampling/sampling_logp_difference/max"] for step in steps), default=None),
        "complaints": wrong,
    }
    print(json.dumps(report), flush=True)
    (folder / "faults.json").write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


def prepare(folder: Path) -> dict[str, str]:
    """A tiny random model and questions, beside the run's folder."""
    sys.path.insert(0, str(ROOT))
    from tests.support.tiny import save_tiny

    inputs = folder.with_name(f"{folder.name}-inputs")
    inputs.mkdir(parents=True, exist_ok=True)
    questions = inputs / "questions.jsonl"
    rows = ({"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(PROBLEMS))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model_name_or_path": save_tiny(inputs / "model"), "dataset_name": str(questions)}


def kill_now_and_then(
    trainer: subprocess.Popen, folder: Path, every: int, chance: random.Random, everyone: set[psutil.Process]
) -> tuple[Counter[str], list[str]]:
    """Until the trainer ends; ``everyone`` becomes all processes it ever had.

    Returns:
        Kills by what was killed, and the kinds that were chosen and never killed.
    """
    kills: Counter[str] = Counter()
    of_kind: Counter[str] = Counter()
    due = chance.randint(1, 2 * every - 1)
    while trainer.poll() is None:
        time.sleep(0.2)
        fronts, workers = processes(trainer, everyone)
        if len(records(folder, "metrics.jsonl")) < due:
            continue
        kind = chance.choice(("server", "reward worker"))
        of_kind[kind] += 0
        victims = [one for front in fronts for one in (front, *engines(front))] if kind == "server" else workers
        if not victims:  # all servers are just coming back
            continue
        time.sleep(chance.random())
        victim = chance.choice(victims)
        try:
            name = "reward worker" if kind == "reward worker" else "front end" if victim in fronts else "engine"
            victim.kill()
        except psutil.NoSuchProcess:
            continue
        print(f"killed: {name} {victim.pid}", flush=True)
        kills[name] += 1
        of_kind[kind] += 1
        due += chance.randint(1, 2 * every - 1)
    return kills, [kind for kind, killed in of_kind.items() if not killed]


def processes(
    trainer: subprocess.Popen, everyone: set[psutil.Process]
) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Front ends of servers that listen, and reward workers."""
    fronts, workers = [], []
    try:
        found = psutil.Process(trainer.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return [], []
    everyone.update(found)
    for process in found:
        try:
            words, above = " ".join(process.cmdline()), " ".join(process.parent().cmdline())
            if KEEPER in words and "igrpo" in above and "vllm.entrypoints" not in above:
                workers.append(process)
            elif "vllm.entrypoints" in words and "igrpo.engines.servers.supervise" in above:
                listens = any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
                fronts += [process] if listens else []
        except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):  # one ended while we looked
            continue
    return fronts, workers


def engines(front: psutil.Process) -> list[psutil.Process]:
    try:
        return [p for p in front.children() if "resource_tracker" not in " ".join(p.cmdline())]
    except psutil.NoSuchProcess:
        return []


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def records(folder: Path, name: str) -> list[dict]:
    """Whole lines; the trainer may be writing the next one."""
    from igrpo.log_lines import read_records

    return list(read_records(folder / name, []))


def complaints(steps: list[dict], groups: list[dict], settings: dict) -> list[str]:
    """What a run without faults would not show."""
    wrong = []
    if [step["step"] for step in steps] != list(range(1, int(settings["max_steps"]) + 1)):
        wrong.append(f"steps are missing or doubled: there are {len(steps)}")
    rows = [group["row"] for group in groups]
    for begin in range(0, len(rows), PROBLEMS):
        epoch = Counter(rows[begin : begin + PROBLEMS])
        if max(epoch.values()) > 1 or begin + len(epoch) != min(begin + PROBLEMS, len(rows)):
            wrong.append(f"epoch {begin // PROBLEMS}: a prompt was used twice")
    per_step = Counter(group["step"] for group in groups)
    if set(per_step.values()) != {PROBLEMS // 10} or len(per_step) != len(steps):
        wrong.append(f"problems per step: {sorted(set(per_step.values()))} in {len(per_step)} steps")
    lag = int(settings.get("policy_lag", 0))
    draft_lag = int(settings.get("draft_policy_lag", 0))
    for group in groups:
        name, step = f"step {group['step']}, row {group['row']}", group["step"]
        counts = len(group["drafts"]), len(group["refinements"])
        if counts != (settings["num_drafts"], settings["num_generations"]):
            wrong.append(f"{name}: {counts} drafts and refinements")
        if not {one["version"] for one in group["refinements"]} <= set(range(step - 1 - lag, step)):
            wrong.append(f"{name}: refinements of versions {[one['version'] for one in group['refinements']]}")
        # Drafts of a group ahead are not trained on: one may be older than its refinements.
        if not lag and not {one["version"] for one in group["drafts"]} <= set(range(step - 1 - draft_lag, step)):
            wrong.append(f"{name}: drafts of versions {[one['version'] for one in group['drafts']]}")
    for step in steps:
        failed = {
            k: v for k, v in step.items() if k.startswith("rewards/") and k.endswith(("errors", "timeouts")) and v
        }
        if failed:
            wrong.append(f"step {step['step']}: completions lost their score: {failed}")
        # In float32 engine and learner agree to rounding: anything more is another version's weights.
        if step["sync/version"] != step["step"] or not step["sync/probe_logp_gap"] < 1e-3:
            wrong.append(f"step {step['step']}: the engine held other weights")
        if not lag and not step["sampling/sampling_logp_difference/max"] < 1e-3:
            wrong.append(f"step {step['step']}: refinements were not sampled from the learner's weights")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
