"""Rates of this machine from a run that was measured on it: ``--calibrate RUN``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import StatisticsError, fmean, median
from typing import Any

from igrpo.config.recipe import build_config, read_yaml
from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Problem
from igrpo.log_lines import read_records
from igrpo.plan.generation import Lengths
from igrpo.plan.hardware import GUESSED, Hardware, Rates
from igrpo.plan.models import run_shape
from igrpo.plan.workload import StepTime, Workload
from igrpo.settings import ConfigError

PROMPTS_COUNTED = 64


@dataclass(frozen=True)
class Measured:
    """Medians over a run's steps, the first left out: it warms caches."""

    config: TrainConfig
    lengths: Lengths
    generation: float
    learner: float
    sync: float
    trained_share: float
    steps: int

    @property
    def total(self) -> float:
        return self.generation + self.learner + self.sync


def read_run(folder: str) -> Measured:
    """Raises ConfigError if the folder is no run with at least two steps and logged completions."""
    try:
        return _read_run(folder)
    except (KeyError, TypeError, StatisticsError) as error:
        raise ConfigError(f"calibrate: the logs of {folder} lack figures ({error}); give another run") from error


def _read_run(folder: str) -> Measured:
    path = Path(folder).expanduser()
    for name in ("config.yaml", "metrics.jsonl", "completions.jsonl"):
        if not (path / name).is_file():
            raise ConfigError(f"calibrate: {folder} has no {name}; give a run folder (with log_completions: true)")
    steps = [r for r in _lines(path / "metrics.jsonl") if "step_time" in r][1:]
    if not steps:
        raise ConfigError(f"calibrate: {folder} has fewer than two steps; a first step alone says little")
    config = build_config(read_yaml(str(path / "config.yaml")))
    if config.policy_lag:
        raise ConfigError(
            f"calibrate: {folder} sampled beside its learner (policy_lag: {config.policy_lag}), so its seconds are not "
            "those of one stage; give a run with policy_lag: 0"
        )
    generation = median(r["rollout/seconds"] for r in steps)
    sync = median(r.get("sync/seconds", 0.0) for r in steps)
    learner = median(r["step_time"] - r["rollout/seconds"] - r.get("sync/seconds", 0.0) for r in steps)
    sequences = sum(r.get("learner/sequences", 1.0) for r in steps)
    skipped = sum(r.get("learner/sequences_skipped", 0.0) for r in steps)
    share = sequences / (sequences + skipped)
    return Measured(config, _lengths(path, config), generation, learner, sync, share, len(steps))


def _lengths(path: Path, config: TrainConfig) -> Lengths:
    """Those of the run's own completions, and its prompts as its tokenizer counts them."""
    from igrpo.models.loading import load_tokenizer, resolve_model
    from igrpo.rollout.prompts import PromptBuilder

    groups = _lines(path / "completions.jsonl")
    drafts = tuple(d["tokens"] for g in groups for d in g["drafts"])
    refinements = tuple(r["tokens"] for g in groups for r in g["refinements"])
    prompts = PromptBuilder(load_tokenizer(resolve_model(config.model_name_or_path), config), config)
    parts = [prompts.parts(Problem(g["row"], g["prompt"], g["solution"])) for g in groups[:PROMPTS_COUNTED]]
    return Lengths(
        question=round(fmean(len(p.bare) for p in parts)),
        mean=fmean(refinements),
        limit=config.max_completion_length,
        template=round(fmean(p.longest_prompt - len(p.bare) for p in parts)),
        observed_drafts=drafts or refinements,
        observed_refinements=refinements,
    )


def predict(measured: Measured, hardware: Hardware, rates: Rates) -> StepTime:
    """The measured run's own step, as the plan sees it: what the scales are taken from, and what errors are against."""
    config = measured.config
    shape, _ = run_shape(config)
    work = Workload(shape, config, hardware, measured.lengths, rates, trained_share=measured.trained_share)
    if config.algorithm == "grpo":
        return work.step("GRPO", "barrier", 0, config.num_generations)
    scheduler = "lag 1" if config.steps_ahead else config.rollout_schedule
    return work.step("iGRPO", scheduler, config.num_drafts, config.num_generations)


def calibrate(measured: Measured, hardware: Hardware) -> Rates:
    """Scales that make the plan agree with this run, stage by stage."""
    step = predict(measured, hardware, GUESSED)
    return replace(
        GUESSED,
        generation_scale=measured.generation / (step.drafts + step.refinements),
        learner_scale=measured.learner / step.learner,
        sync_scale=measured.sync / step.sync if measured.sync else 1.0,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Without what is no record, which is said."""
    notes: list[str] = []
    records = list(read_records(path, notes))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return records
