"""A plan: one question, a base recipe, and arms that each change a few settings of it."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from igrpo.config.train_config import TrainConfig
from igrpo.settings import ConfigError
from igrpo.settings.section import field_types

FOLDER = Path(__file__).resolve().parent
PLANS, RESULTS = FOLDER / "plans", FOLDER / "results"
BASE_CPU, BASE_GPU = FOLDER / "base-cpu.yaml", FOLDER / "base-gpu.yaml"


@dataclass(frozen=True)
class Plan:
    """Example: ``Plan("controls", "Which draft …?", "grpo", {"grpo": {"algorithm": "grpo"}, "igrpo": {}})``"""

    name: str
    question: str
    baseline: str
    """The arm that differences are taken against."""
    arms: dict[str, dict[str, Any]]
    """Settings that each arm changes in the base recipe."""
    baselines: dict[str, str] = field(default_factory=dict)
    """Arms that are compared with another arm than ``baseline``."""
    base: str = BASE_CPU.name
    """Recipe of what all arms share, beside this module; ``--base`` names another."""
    every_arm: dict[str, Any] = field(default_factory=dict)
    """Settings that all arms change in the base recipe."""

    def baseline_of(self, arm: str) -> str:
        return self.baselines.get(arm, self.baseline)

    def settings(self, arm: str, base: dict[str, Any], processes: int = 1) -> dict[str, Any]:
        """Every setting of one arm.

        ``prompts_per_step`` of the base recipe is kept equal over arms, so that every arm sees a problem equally often
        in equally many updates. ``per_device_train_batch_size`` is the most that a micro-batch may hold.
        """
        settings = {**base, **self.every_arm, **self.arms[arm]}
        prompts, largest = settings.pop("prompts_per_step"), settings["per_device_train_batch_size"]
        if prompts % processes:
            raise ConfigError(f"prompts_per_step: {prompts} prompts do not divide over {processes} processes")
        completions = prompts // processes * settings["num_generations"]
        micro_batch = max(n for n in range(1, min(largest, completions) + 1) if completions % n == 0)
        settings["per_device_train_batch_size"] = micro_batch
        settings["gradient_accumulation_steps"] = completions // micro_batch
        return settings


def load_plan(name: str) -> Plan:
    """The plan of that name in ``plans/``.

    Raises:
        ConfigError: no such plan, or one with a key that does not exist.
    """
    path = PLANS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in PLANS.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no plan named {name!r}{hint} There are: {', '.join(known)}")
    plan = Plan(name=name, **yaml.safe_load(path.read_text(encoding="utf-8")))
    for arm in {plan.baseline, *plan.baselines, *plan.baselines.values()} - set(plan.arms):
        raise ConfigError(f"{path.name}: {arm!r} of its baselines is no arm; arms: {', '.join(plan.arms)}")
    for arm, settings in [("every_arm", plan.every_arm), *plan.arms.items()]:
        for key in set(settings) - set(field_types(TrainConfig)):
            raise ConfigError(f"{path.name}: {arm} has an unknown key {key!r}")
    return plan


def load_base(path: Path | None, plan: Plan | None = None) -> dict[str, Any]:
    """The recipe at ``path``, or else the plan's own."""
    path = path or FOLDER / (plan.base if plan else BASE_CPU.name)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fingerprint(settings: dict[str, Any]) -> str:
    """Tells whether a record was made with these settings; where the run's folder lies does not matter."""
    kept = {k: v for k, v in settings.items() if k not in ("output_dir", "resume_from_checkpoint", "run_name")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
