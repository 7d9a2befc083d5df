"""The tables that open docs/results.md: what a task looks like, what to run there, and the figures that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.record import load_records, read_json
from experiments.summary import detectable, difference, holm, p_value, show

LEVEL = 0.05
PUBLISHED, DRAFTS, BARE = "iGRPO as published", "`train_on_drafts: true`", "`refinement_context: bare`"
DEAD, BOTH, RLTF = "`refine_only: dead`, drafts trained on", "`refinement_context: both`", "RLTF-SD"
SDPO, HALF = "SDPO, averaged teacher", "half SDPO, fixed teacher"
METHODS = (PUBLISHED, DRAFTS, DEAD, BARE, BOTH, RLTF, SDPO, HALF)
LAB_ARMS = dict(
    zip(METHODS, ("igrpo", "train_on_drafts", "dead", "bare", "both", "rltf_sd", "sdpo_ema", "sdpo_base"), strict=True)
)
GRPO = "grpo"

Cell = tuple[str, str, str]
"""Plan, arm, and the arm that it is held against."""
TASKS: tuple[tuple[str, str, Mapping[str, Cell]], ...] = (
    ("right half the time; answers short enough to copy", "matched-budget",
     {PUBLISHED: ("matched-budget", "igrpo", GRPO), DRAFTS: ("train-on-drafts", "train_on_drafts", GRPO)}),
    ("the same; only the right answer is rewarded", "accuracy-only", {PUBLISHED: ("accuracy-only", "igrpo", GRPO)}),
    ("right one time in five; seeing a draft does not help", "harder-tasks",
     {PUBLISHED: ("harder-tasks", "igrpo", GRPO)}),
    *(
        # Full SDPO takes no reward into its gradient: on lab-sparse it is lab-sorting's runs, seed for seed.
        (task, plan, {m: (plan, arm, GRPO) for m, arm in LAB_ARMS.items() if (plan, m) != ("lab-sparse", SDPO)})
        for task, plan in (
            ("right once in 20,000, no partial credit; a wrong draft makes right answers likelier", "lab-control"),
            ("the same, but right once in 310", "lab-fed"),
            ("right once in 25, with partial credit; a draft is work done", "lab-sorting"),
            ("the same, but without partial credit", "lab-sparse"),
        )
    ),
)  # fmt: skip
"""What the bare prompt does before training; its plan; the cell of each method that was tried."""
LATE = {("matched-budget", "igrpo"), ("train-on-drafts", "train_on_drafts"), ("lab-control", "train_on_drafts")}
"""Arms that were given more seeds after the first had been seen."""
BESIDE: tuple[tuple[str, str, str, Cell, tuple[str, str]], ...] = (
    ("SmolLM2-135M, drafts mostly right", DRAFTS, PUBLISHED, ("train-on-drafts", "train_on_drafts", "igrpo"),
     ("train-on-drafts", GRPO)),
    ("the same", "16 drafts + 16 refinements", "4 + 4", ("budget", "total_32", "total_8"), ("controls", GRPO)),
    *((plan, DEAD, DRAFTS, (plan, "dead", "train_on_drafts"), (plan, GRPO))
      for plan in ("lab-control", "lab-fed", "lab-sorting", "lab-sparse")),
    *((plan, HALF, DEAD, (plan, "sdpo_base", "dead"), (plan, GRPO))
      for plan in ("lab-control", "lab-fed", "lab-sorting", "lab-sparse")),
)  # fmt: skip
"""Task, what is tried, what it is held against, their cell, and plan and arm of GRPO there."""
HEAD = """\
## If your task looks like this, run that

Points of accuracy on the bare prompt, against GRPO with as many rollouts: the mean over seeds of the differences, and \
its 95 % interval. **Bold** is better than GRPO and plain is worse, after Holm's correction over all cells of this \
table; a corrected p from 0.01 to 0.2 is written beside them. *Not shown* is neither; in brackets stands the smallest \
true difference that these seeds would have shown four times in five, at the level that the correction asked for. \
† some of the seeds were added after the first had been seen. Empty: not tried. Where several are better, they stand \
in the order of their means, which is not tested here.

RLTF-SD trains refinements under the question alone, with the drafts' mean reward for the baseline. SDPO is \
distillation from the policy that sees a right draft, whose weights are averaged or fixed; *half* gives it half the \
weight beside GRPO's loss; both refine dead groups alone and train on the drafts.

No method was tuned: all have one learning rate and one length, chosen on GRPO, on single pilot runs, or (the length \
of lab-control) on iGRPO's first seed, which counts. What a [smaller rate](#lab-rates) (four arms, one task) and a \
[longer run](#lab-long) (three arms, one task) change is below. Intervals are over seeds of one model for each task, \
so they say nothing about other models.
"""
SECOND = """\
## If you run a second stage anyway

Differences between two second stages, corrected among themselves; GRPO, which needs none, in the last column.
"""
LAB_ROWS = """\
The last four rows of the first table are models of 0.3 and 0.4 M parameters on [tasks made for the \
question](#the-laboratory). In lab-control GRPO met no reward in any seed, so it stayed the untrained policy, and p \
tests only that the other arm does not end at nothing. The task of lab-control and lab-fed was chosen with results in \
sight, and its likeliest answer is right before any training: sampling at temperature 0.8 lets GRPO learn it \
(lab-fed), so before a second stage look for a setting in which some answers are rewarded. The task of the other two \
was chosen by its starting points, its learning rate and length by one run of GRPO. At equal decoded tokens iGRPO as \
published is {matched-budget/igrpo/minus_baseline_at_equal_tokens} points from GRPO in the first row and \
{accuracy-only/igrpo/minus_baseline_at_equal_tokens} in the second; in the laboratory answers are about equally long, \
but for SDPO runs that collapse, which write fewer tokens, and no verdict changes with it.
"""


@dataclass(frozen=True)
class Judged:
    """A difference among those that are corrected together."""

    gap: dict[str, Any]
    p: float
    """Holm's."""
    level: float
    """What p had to stay below before the correction."""
    late: bool = False

    @property
    def shown(self) -> bool:
        return self.p <= LEVEL

    def cell(self) -> str:
        text = show(self.gap, 100) + " †" * self.late
        said = f", p {self.p:.2g}" if 0.01 <= self.p <= 0.2 else ""
        if not self.shown:
            return f"{text} *not shown*{said} [{100 * detectable(self.gap, self.level):.0f}]"
        return (f"**{text}**" if self.gap["mean"] > 0 else text) + said


def judge(results: Path, cells: Sequence[Cell]) -> dict[Cell, Judged]:
    """Those of the cells that have an interval, corrected together."""
    found = {cell: gap for cell in cells if (gap := _gap(results, cell)) is not None}
    raw = {cell: p_value(gap) for cell, gap in found.items()}
    ps = dict(zip(found, holm([*raw.values()]), strict=True))
    # Holm compares the smallest p with LEVEL / n, the next with LEVEL / (n - 1), …, and stops where one fails.
    last = LEVEL / max(len(found) - sum(p <= LEVEL for p in ps.values()), 1)
    return {cell: Judged(gap, ps[cell], last, cell[:2] in LATE) for cell, gap in found.items()}


def of_tasks(results: Path) -> dict[Cell, Judged]:
    """Those of the first table."""
    return judge(results, [cell for *_, cells in TASKS for cell in cells.values()])


def of_pairs(results: Path) -> dict[Cell, Judged]:
    """Those of the second table."""
    return judge(results, [cell for *_, cell, _ in BESIDE])


def opening(results: Path) -> list[str]:
    """Markdown; empty where no plan has been run."""
    found = of_tasks(results)
    if not found:
        return []
    lines = [HEAD, f"| from the bare prompt | run | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 2) + "|"]
    for task, name, cells in TASKS:
        own = {method: found[cell] for method, cell in cells.items() if cell in found}
        if own:
            figures = [own[m].cell() if m in own else "" for m in METHODS]
            lines.append(f"| [{task}](#{name}) | {_advice(own)} | {' | '.join(figures)} |")
    return [*lines, ""]


def beside(results: Path) -> list[str]:
    """The second table; empty where no plan has been run."""
    found = of_pairs(results)
    lines = []
    for task, what, other, cell, (plan, grpo) in BESIDE:
        if cell in found:
            name, arm, against = cell
            tried, held = (_accuracy(results, name, one) for one in (arm, against))
            words = [f"[{task}](#{name})", f"{what}: {tried}", f"{other}: {held}", found[cell].cell()]
            lines.append(f"| {' | '.join([*words, _accuracy(results, plan, grpo)])} |")
    heads = "| task | this | against that | difference | GRPO |\n|---|---|---|---|---|"
    return [SECOND, heads, *lines, ""] if lines else []


def _gap(results: Path, cell: Cell) -> dict[str, Any] | None:
    """An arm's difference from another, where there is one with an interval."""
    name, arm, against = cell
    path = results / name / "summary.json"
    arms = read_json(path)["arms"] if path.is_file() else {}
    if not {arm, against} <= arms.keys():
        return None
    gap = arms[arm]["minus_baseline"]
    if arms[arm]["against"] != against:
        records = load_records(results / name)
        gap = difference(*([r for r in records if r["arm"] == one] for one in (arm, against)))
    return gap if gap and gap["half_width"] is not None else None


def _accuracy(results: Path, name: str, arm: str) -> str:
    path = results / name / "summary.json"
    return show(read_json(path)["arms"].get(arm, {}).get("accuracy") if path.is_file() else None, 100)


def _advice(own: Mapping[str, Judged]) -> str:
    """The methods that are better than GRPO, the best mean first; else GRPO."""
    better = [m for m, one in own.items() if one.shown and one.gap["mean"] > 0]
    if better:
        return ", else ".join(sorted(better, key=lambda m: -own[m].gap["mean"]))
    return "GRPO" if any(one.shown for one in own.values()) else "GRPO, for its simplicity: nothing is shown"
