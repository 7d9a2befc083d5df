"""The table that opens docs/results.md: what a task looks like, what to run there, and the figures that say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.record import read_json
from experiments.summary import detectable, holm, p_value, show

LEVEL = 0.05
PUBLISHED, DRAFTS, BARE = "iGRPO as published", "`train_on_drafts: true`", "`refinement_context: bare`"
DEAD, RLTF, SDPO = "`refine_only: dead`, drafts trained on", "RLTF-SD", "SDPO"
METHODS = (PUBLISHED, DRAFTS, DEAD, BARE, "`both`", RLTF, SDPO, "half SDPO", "half SDPO, first weights teach")
LAB_ARMS = dict(
    zip(METHODS, ("igrpo", "train_on_drafts", "dead", "bare", "both", "rltf_sd", "sdpo", "sdpo_half", "sdpo_base"),
        strict=True)
)  # fmt: skip
TASKS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("right half the time; answers short enough to copy", "matched-budget", {PUBLISHED: "igrpo"}),
    ("the same; only the right answer is rewarded", "accuracy-only", {PUBLISHED: "igrpo"}),
    ("right one time in five; seeing a draft does not help", "harder-tasks", {PUBLISHED: "igrpo"}),
    ("never right, no partial credit; a wrong draft makes right answers likelier", "lab-control", LAB_ARMS),
    ("the same, but right once in 310", "lab-fed", LAB_ARMS),
    ("right once in 25, with partial credit; a draft is work done", "lab-sorting", LAB_ARMS),
    ("the same, but without partial credit", "lab-sparse", LAB_ARMS),
)
"""What the bare prompt does before training; the plan whose baseline is GRPO; the arm of each method that was tried."""
BESIDE = (
    ("iGRPO on drafts that are mostly right (seeds 3 to 5 were added since the first had come out better)", DRAFTS,
     PUBLISHED, "train-on-drafts", "train_on_drafts"),
    ("four times the rollouts are affordable", "16 drafts + 16 refinements", "4 + 4", "budget", "total_32"),
)  # fmt: skip
"""Other decisions: what is decided, what to run where the arm is better, what where it is worse, plan and arm."""
HEAD = """\
## If your task looks like this, run that

Points of accuracy on the bare prompt, against GRPO with as many rollouts: the mean over seeds and its 95 % interval. \
Bold is better than GRPO and plain is worse, both after Holm's correction over all the cells of this page's first two \
tables. *Not shown* is neither; the number behind it is the least true difference that so many seeds would have shown \
four times in five, before the correction. Empty: not tried.
"""
LAB_ROWS = """\
The last four rows are models of 0.3 and 0.4 M parameters on [tasks made for the question](#the-laboratory). In \
lab-control {lab-control/grpo/zero_variance_groups} % of GRPO's groups had no gradient: at 100, GRPO is one untouched \
policy in every seed, and p tests only that the other arm does not end at nothing. The task of lab-control and lab-fed \
was chosen with results in sight, and greedy decoding gets it right before any training; that of the other \
two was chosen by its starting points, and its learning rate and length by one run of GRPO.
"""


def opening(results: Path) -> list[str]:
    """Markdown; empty where no plan has been run."""
    cells = {(name, arm): _gap(results, name, arm) for _, name, arms in TASKS for arm in arms.values()}
    cells |= {(name, arm): _gap(results, name, arm) for *_, name, arm in BESIDE}
    found = {where: gap for where, gap in cells.items() if gap is not None}
    ps = dict(zip(found, holm([p_value(gap) for gap in found.values()]), strict=True))
    if not found:
        return []
    lines = [HEAD, f"| from the bare prompt | run | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 2) + "|"]
    for task, name, arms in TASKS:
        own = {method: (name, arm) for method, arm in arms.items() if (name, arm) in found}
        if own:
            figures = [_cell(found[own[m]], ps[own[m]]) if m in own else "" for m in METHODS]
            lines.append(f"| [{task}](#{name}) | {_advice(own, found, ps)} | {' | '.join(figures)} |")
    rows = [_beside(row, found[row[3:]], ps[row[3:]]) for row in BESIDE if row[3:] in found]
    return [*lines, "", *(["| beside that | run | what says so |\n|---|---|---|", *rows, ""] if rows else [])]


def _gap(results: Path, name: str, arm: str) -> dict[str, Any] | None:
    """An arm's difference from its plan's baseline, where there is one with an interval."""
    path = results / name / "summary.json"
    figures = read_json(path)["arms"].get(arm) if path.is_file() else None
    gap = figures and figures["minus_baseline"]
    return gap if gap and gap["half_width"] is not None else None


def _cell(gap: dict[str, Any], p: float) -> str:
    text = show(gap, 100)
    if p > LEVEL:
        return f"{text} *not shown* ({100 * detectable(gap):.1f})"
    return f"**{text}**" if gap["mean"] > 0 else text


def _advice(own: Mapping[str, tuple[str, str]], found: Mapping, ps: Mapping) -> str:
    """The methods that are better than GRPO, the best mean first; else GRPO."""
    better = [m for m, where in own.items() if ps[where] <= LEVEL and found[where]["mean"] > 0]
    return ", else ".join(sorted(better, key=lambda m: -found[own[m]]["mean"])) or "GRPO"


def _beside(row: tuple[str, ...], gap: dict[str, Any], p: float) -> str:
    what, better, worse, name, _ = row
    said = f"{better}, not {worse}" if gap["mean"] > 0 else f"{worse}, not {better}"
    return f"| {what} | {said if p <= LEVEL else f'{better} or {worse}'} | [{_cell(gap, p)}](#{name}) |"
