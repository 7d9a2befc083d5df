"""``python -m experiments.page`` writes docs/results.md from the committed records and the paper's figures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

from experiments import starting_points, test_time
from experiments.choices import LAB_ROWS, LEVEL, beside, of_pairs, of_tasks, opening
from experiments.plan import FOLDER, PLANS, RESULTS, load_plan
from experiments.record import load_records, read_json
from experiments.summary import holm, p_value, show

READING, LAB = FOLDER / "reading.md", FOLDER / "lab.md"
PAGE = FOLDER.parent / "docs" / "results.md"
TABLES = (
    ("accuracy_before", "accuracy_halfway", "accuracy_best", "accuracy", "minus_baseline",
     "minus_baseline_at_equal_tokens", "format", "reward", "reward_minus_baseline"),
    ("zero_variance_groups", "copy_rate", "copy_rate_last", "refinement_accuracy_last",
     "chosen_accuracy_last", "answer_equals_draft", "entropy_last", "bare_entropy_first", "bare_entropy_last",
     "bare_entropy_at_equal_accuracy",
     "decoded_tokens", "core_hours", "samples_per_core_second", "peak_memory_gib"),
)  # fmt: skip
"""Where the arms ended; how they got there and what it cost."""
COLUMNS = {
    "accuracy_before": ("accuracy before", 100),
    "accuracy_halfway": ("half-way", 100),
    "accuracy_best": ("best on the way", 100),
    "accuracy": ("accuracy after", 100),
    "minus_baseline": ("minus baseline", 100),
    "minus_baseline_at_equal_tokens": ("the same at equal decoded tokens", 100),
    "format": ("format after", 100),
    "reward": ("reward after", 1),
    "reward_minus_baseline": ("reward minus baseline", 1),
    "zero_variance_groups": ("groups without gradient", 100),
    "refinement_accuracy_last": ("right refinements in the last three steps", 100),
    "chosen_accuracy_last": ("right among the drafts shown there", 100),
    "copy_rate": ("copied 4-grams", 100),
    "copy_rate_first": ("copied in the first step", 100),
    "copy_rate_last": ("in the last step", 100),
    "answer_equals_draft": ("answer is the draft's", 100),
    "entropy_last": ("entropy, nats", 1),
    "bare_entropy_first": ("on the bare prompt in the first step", 1),
    "bare_entropy_last": ("in the last three", 1),
    "bare_entropy_at_equal_accuracy": ("minus the baseline's at equal accuracy", 1),
    "decoded_tokens": ("decoded tokens, thousands", 1e-3),
    "core_hours": ("core minutes", 60),
    "samples_per_core_second": ("rollouts per core second", 1),
    "peak_memory_gib": ("peak GiB", 1),
}
"""Key of a summary -> heading and factor."""
INTRO = """\
## How to read this page

`python -m experiments.page` writes this page from the records in `experiments/results/`, and a test fails when the
two differ. Accuracy is in per cent of held-out problems. The model answers each once, from the bare prompt, as it
would be deployed.

`±` is the 95 % interval of the mean over seeds (Student's t). For accuracy, format and reward it is never narrower
than the error that so few answers have by chance. A figure without an interval comes from one seed and shows nothing.
Differences are taken seed by seed, over the seeds that both arms have. The ± of a difference that is not shown bounds
nothing: a true effect of that size would be seen about every other time, and less often after a correction. This page
judges dozens of differences, so expect one or two to look real by chance.

The two opening tables correct over all their own cells. A plan's section lists verdicts without a correction, and then
p corrected over that plan alone, so a difference can be "worse" there and not shown in the opening table: RLTF-SD in
lab-fed and `refine_only: dead` in lab-sparse are. The opening table counts, and running text follows it.

Runs repeat: seeds 0 and 1 of iGRPO were trained again half a day of commits later, and every figure but times and
memory came out the same to the last digit; so did lab-sorting's first iGRPO seed, and seeds 0 to 5 of lab-control's
`grpo` and `dead`, at another commit. A change of the loss's last bit changes a run: lab-control was trained again after
one, and seed 0 of `train_on_drafts` came to 41.2 % where it had been 44.2; most others ended where they had.

All runs but the laboratory's were graded by earlier rules. The present ones (docs/rewards.md) are stricter: they judge
44 of the 3,072 completions of a quickstart run otherwise, so a run that is trained with them takes another course.

Everything but the laboratory was trained with SmolLM2-135M on two CPU cores, on one-digit sums and products. That can
show whether the mechanism works and what it costs. It says nothing about 7B models on mathematics: the paper's figures
stand beside ours to show what was asked, not because the scales compare.
"""

HEADLINES = (
    ("matched-budget", "igrpo", "8 rollouts, accuracy and format rewarded"),
    ("accuracy-only", "igrpo", "8 rollouts, only accuracy rewarded"),
    ("harder-tasks", "igrpo", "the same on tasks that start near 20 %"),
    ("controls", "random", "a random draft in the place of the best"),
    ("controls", "worst", "the worst draft in the place of the best"),
    ("controls", "none", "no draft shown, so that the group of 4 is all that is left of the second stage"),
    ("remedies", "hide_answer", "the draft's final answer hidden"),
    ("remedies", "resample", "groups without gradient replaced by other problems"),
    ("train-on-drafts", "train_on_drafts", "drafts trained on as well, under the bare prompt"),
    ("selection-score", "accuracy_first", "drafts ranked by correctness before format"),
    ("schedules", "lag_1", "drafts from the weights of the step before"),
    ("schedules", "early_stop", "drafting stopped at the first draft that cannot be beaten"),
    ("split", "n2_g6", "2 drafts and 6 refinements instead of 4 and 4"),
    ("split", "n6_g2", "6 drafts and 2 refinements instead of 4 and 4"),
    ("budget", "total_4", "half the rollouts"),
    ("budget", "total_16", "twice the rollouts"),
    ("budget", "total_32", "four times the rollouts"),
    ("wrapper", "i_dapo", "the second stage around DAPO"),
    ("wrapper", "i_gspo", "the second stage around GSPO"),
    ("wrapper", "i_dr_grpo", "the second stage around Dr. GRPO"),
    ("beta", "beta_1e-4", "a KL penalty of 0.0001"),
    ("beta", "beta_1e-3", "a KL penalty of 0.001"),
    ("beta", "beta_1e-2", "a KL penalty of 0.01"),
    ("schedules", "barrier", "every draft awaited before the first refinement"),
)
"""Plan, arm, and what is changed between it and its baseline: a row of the page's first table."""
GRADED = """\
Tasks with partial credit, as small as reasoning-gym makes them, with its own score and beside one of the model's own \
drafts: none starts high enough, and a draft adds nearly nothing, so they were not trained on, and \
[sorting](#the-laboratory) was made instead. Countdown's right answers are none: `accuracy` takes the target number \
for one, which the score does not\
"""
NO_CLAIM, NO_DIFFERENCE = "one seed, no claim", "no difference that these seeds can show"
SCATTER = 0.1
"""Standard deviation of accuracy over the seeds of an arm."""
SHORT = {
    NO_CLAIM: "(one seed)",
    NO_DIFFERENCE: "",
    "better": "**better** (uncorrected)",
    "worse": "**worse** (uncorrected)",
}
"""Verdicts as a cell has room for them."""


def page(results: Path = RESULTS) -> str:
    """The whole page as Markdown."""
    paper = read_json(FOLDER / "paper.json")
    parts = [
        "# Results\n",
        *opening(results),
        *beside(results),
        *filled(results, LAB_ROWS),
        INTRO,
        *reading(results, LAB),
        *before_training(results, "lab", "Before training"),
        *before_training(results, "sorting", "And"),
        *reading(results),
        *_headlines(results),
        *tasks(results),
        *before_training(results, "graded", GRADED),
        _overview(paper, results),
    ]
    for path in sorted(PLANS.glob("*.yaml")):
        parts.append(_section(path.stem, paper, results))
    return "\n".join(parts)


def _headlines(results: Path) -> list[str]:
    rows = []
    for name, arm, what in HEADLINES:
        summary = _summary(name, results)
        figures = summary["arms"].get(arm) if summary else None
        if figures is None or figures["against"] not in summary["arms"]:
            continue
        other = figures["against"]
        cells = [
            f"[{what}](#{name}), `{arm}` against `{other}`",
            show(figures["accuracy"], 100),
            show(summary["arms"][other]["accuracy"], 100),
            *(
                f"{show(figures[key], factor)} {SHORT[judged(figures[key])]}".rstrip()
                for key, factor in (("minus_baseline", 100), ("reward_minus_baseline", 1))
            ),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    return [
        f"## One by one\n\nOn the bare prompt, after training. Without a word: {NO_DIFFERENCE}.\n",
        "| what is changed | accuracy | its baseline's | difference | in reward |\n|---|---|---|---|---|",
        *rows,
        "",
    ]


def reading(results: Path, source: Path = READING) -> list[str]:
    """`source` with its figures filled in; a paragraph that quotes a figure nobody measured yet is left out.

    ``{plan/arm/key}`` stands for a figure of a summary, ``{plan/arm/key?}`` for what a difference's interval supports.
    """
    return filled(results, source.read_text(encoding="utf-8"))


def filled(results: Path, text: str) -> list[str]:
    """``text`` with its figures filled in, as in ``reading``."""
    opened = {cell: one.p for cell, one in (of_pairs(results) | of_tasks(results)).items()}

    def fill(found: re.Match[str]) -> str:
        name, arm, key, verdict = found.groups()
        summary = _summary(name, results)
        if summary is None or arm not in summary["arms"]:
            raise LookupError(found.group())
        figure = summary["arms"][arm][key]
        if not verdict:
            return show(figure, COLUMNS[key][1])
        found = judged(figure) in ("better", "worse") and key == "minus_baseline"
        alone = found and opened.get((name, arm, summary["arms"][arm]["against"]), corrected(summary)[arm]) > LEVEL
        return judged(figure) + (" alone, not after Holm's correction" if alone else "")

    kept = []
    for paragraph in text.split("\n\n"):
        try:
            kept.append(re.sub(r"\{([\w-]+)/([\w-]+)/(\w+)(\?)?\}", fill, paragraph))
        except LookupError:
            continue
    return ["\n\n".join(kept).rstrip() + "\n"]


def tasks(results: Path) -> list[str]:
    path = results / starting_points.RECORD.name
    if not path.is_file():
        return []
    record = read_json(path)
    text = (
        f"## Which tasks\n\nWhat {record['model']} gets right before any training, from the experiments' bare prompt "
        f"(`{record['command']}`). In bold: between 10 % and 60 %, where there is something to learn and something to "
        "learn from."
    )
    own = _summary("matched-budget", results)
    if own is not None and "grpo" in own["arms"]:
        start = show(own["arms"]["grpo"]["accuracy_before"], 100)
        text += f" The first is the experiments' own; over the held-out problems of their seeds it starts at {start}."
    return [f"{text}\n", *starting_points.table(record), ""]


def before_training(results: Path, name: str, text: str) -> list[str]:
    path = results / f"starting-points-{name}.json"
    if not path.is_file():
        return []
    record = read_json(path)
    return [f"{text} (`{record['command']}`):\n", *starting_points.table(record), ""]


def judged(gap: dict[str, Any] | None) -> str:
    """What an interval of paired differences supports."""
    if gap is None or gap["half_width"] is None:
        return NO_CLAIM
    if abs(gap["mean"]) <= gap["half_width"]:
        return NO_DIFFERENCE
    return "better" if gap["mean"] > 0 else "worse"


def _overview(paper: dict[str, Any], results: Path) -> str:
    source = paper["source"]
    lines = [
        f"## Against the paper\n\n{source}.\n",
        "| in the paper | what | the paper's figures | here |",
        "|---|---|---|---|",
    ]
    for table in paper["tables"]:
        figures = "; ".join(f"{name}: {value}" for name, value in table["rows"]) or "–"
        lines.append(f"| {table['id']} | {table['what']} | {figures} | {_state(table, results)} |")
    return "\n".join(lines) + "\n"


def _state(table: dict[str, Any], results: Path) -> str:
    if table["plan"] is None:
        return table["why_not"]
    summary = _summary(table["plan"], results)
    if summary is None:
        return f"not run yet: `python -m experiments {table['plan']}`"
    missing = f"; arms missing: {', '.join(summary['missing_arms'])}" if summary["missing_arms"] else ""
    ours = []
    for key in table.get("ours", ["accuracy"]):
        title, factor = COLUMNS[key]
        cells = ", ".join(f"{arm} {show(figures[key], factor)}" for arm, figures in summary["arms"].items())
        ours.append(f"{title}: {cells}")
    return f"[{table['plan']}](#{table['plan']}): {'; '.join(ours)}{missing}"


def _section(name: str, paper: dict[str, Any], results: Path) -> str:
    plan, summary = load_plan(name), _summary(name, results)
    others = "".join(f", that of `{arm}` `{other}`" for arm, other in plan.baselines.items())
    command = f"`python -m experiments {name}`, baseline `{plan.baseline}`{others}.\n"
    lines = [f"## {name}\n", f"{plan.question}\n", command]
    if summary is None:
        return "\n".join([*lines, "Not run yet.\n"])
    for keys in TABLES:
        lines += ["| arm | seeds | " + " | ".join(COLUMNS[key][0] for key in keys) + " |"]
        lines += ["|---" * (len(keys) + 2) + "|"]
        for arm, figures in summary["arms"].items():
            cells = [show(figures[key], COLUMNS[key][1]) for key in keys]
            lines.append(f"| {arm} | {len(figures['seeds'])} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(verdict(summary) + scattered(load_records(results / name), list(summary["arms"])))
    if at_test := test_time.table(results / name / "test-time", list(plan.arms)):
        lines += ["", *at_test]
    for folder in sorted((results / name).glob(f"{test_time.PASS_AT_K}*")):
        lines += ["", *test_time.pass_table(folder, plan)]
    for picture, text in (("outcome", "Where the arms ended"), ("course", "How they got there")):
        if (results / name / f"{picture}.svg").is_file():
            lines += ["", f"![{text}](../experiments/results/{name}/{picture}.svg)"]
    return "\n".join([*lines, ""])


def verdict(summary: dict[str, Any]) -> str:
    """What the intervals support, arm by arm: nothing more."""
    found = []
    for arm, figures in summary["arms"].items():
        for key, what in (("minus_baseline", "accuracy"), ("reward_minus_baseline", "reward")):
            gap = figures[key]
            if arm == summary["baseline"] or gap is None:
                continue
            other = "" if figures["against"] == summary["baseline"] else f" against `{figures['against']}`"
            found.append(f"`{arm}`{other}, {what}: {judged(gap)}")
    said = "; ".join(found) or "nothing to compare yet"
    text = f"What the intervals support, against `{summary['baseline']}`: {said}."
    if len(ps := corrected(summary)) > 1:
        values = ", ".join(f"`{arm}` {p:.2g}" for arm, p in ps.items())
        text += f" Accuracy after Holm's correction over these {len(ps)} comparisons, p: {values}."
    return text


def scattered(records: list[dict[str, Any]], arms: list[str]) -> str:
    """The seeds of arms that end so far apart that a mean says little."""
    found = []
    for arm in arms:
        ends = [r["evaluations"][-1]["accuracy"] for r in sorted(records, key=lambda r: r["seed"]) if r["arm"] == arm]
        if len(ends) > 2 and stdev(ends) > SCATTER:
            found.append(f"`{arm}` {', '.join(f'{100 * end:.1f}' for end in ends)}")
    return f" Seed by seed, where they end far apart: {'; '.join(found)}." if found else ""


def corrected(summary: dict[str, Any]) -> dict[str, float]:
    """p of each arm's difference in accuracy, Holm's over those of the plan."""
    gaps = {arm: figures["minus_baseline"] for arm, figures in summary["arms"].items() if arm != summary["baseline"]}
    gaps = {arm: gap for arm, gap in gaps.items() if judged(gap) != NO_CLAIM}
    return dict(zip(gaps, holm([p_value(gap) for gap in gaps.values()]), strict=True))


def _summary(name: str, results: Path) -> dict[str, Any] | None:
    path = results / name / "summary.json"
    return read_json(path) if path.is_file() else None


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
