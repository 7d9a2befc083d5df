"""From records to the figures that are quoted: means over seeds with intervals, and differences from the baseline.

The interval of a mean over seeds is Student's t at 95 % (few seeds: wide, and honest about it). Three seeds can agree
by luck, so the interval of a share p of n answers is never narrower than the sampling error of the answers alone:
1.96 · sqrt(sum over seeds of p (1 - p) / n) / seeds, for a difference with the terms of both arms. A p of 0 or 1 counts
as one of half an answer, since none right of a few hundred does not mean never. For the reward, the
sum of two such shares, the deviations are added before they are squared: the widest, whatever their correlation. A
difference from the baseline arm is paired by seed: both arms saw the same problems in the same order and are judged on
the same held-out ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.plan import Plan
from experiments.record import load_records, write_json

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantile of Student's t for 1, 2, … degrees of freedom."""
SHARES = {"accuracy": ("accuracy",), "format": ("format",), "reward": ("accuracy", "format")}
"""Figure of an evaluation -> the shares it is the sum of."""


def summarise(folder: Path, plan: Plan) -> Path:
    """Writes ``summary.json`` beside the records; returns its path."""
    records = load_records(folder)
    arms = {arm: [r for r in records if r["arm"] == arm] for arm in plan.arms}
    arms = {arm: rs for arm, rs in arms.items() if rs}
    summary = {
        "plan": plan.name,
        "question": plan.question,
        "baseline": plan.baseline,
        "arms": {
            arm: {"against": plan.baseline_of(arm), **summarise_arm(rs, arms.get(plan.baseline_of(arm), []))}
            for arm, rs in arms.items()
        },
        "missing_arms": [arm for arm in plan.arms if arm not in arms],
    }
    path = folder / "summary.json"
    write_json(path, summary)
    return path


def summarise_arm(records: Sequence[dict], baseline: Sequence[dict]) -> dict[str, Any]:
    """Figures of one arm over its seeds."""
    base = {r["seed"]: r for r in baseline}
    shared = [r for r in records if r["seed"] in base]
    others = [base[r["seed"]] for r in shared]
    counted = [r for r in records if r["totals"]["core_seconds"] is not None]

    def noise(key: str, end: int = -1) -> float:
        return sampling_error([answer_variance(r, key, end) for r in records])

    def gap_noise(key: str) -> float:
        return paired_noise(shared, others, key)

    return {
        "seeds": sorted(r["seed"] for r in records),
        "accuracy_before": interval([r["evaluations"][0]["accuracy"] for r in records], noise("accuracy", 0)),
        "accuracy_halfway": interval([halfway(r) for r in records], noise("accuracy")),
        "accuracy_best": interval([max(e["accuracy"] for e in r["evaluations"]) for r in records], noise("accuracy")),
        "accuracy": interval([outcome(r, "accuracy") for r in records], noise("accuracy")),
        "reward": interval([outcome(r, "reward") for r in records], noise("reward")),
        "reward_minus_baseline": interval(
            [outcome(r, "reward") - outcome(base[r["seed"]], "reward") for r in shared], gap_noise("reward")
        ),
        "format": interval([outcome(r, "format") for r in records], noise("format")),
        "minus_baseline": difference(records, baseline),
        "minus_baseline_at_equal_tokens": interval(
            [at_equal_tokens(r, base[r["seed"]]) for r in shared], gap_noise("accuracy")
        ),
        "zero_variance_groups": interval([mean_of(r, "frac_reward_zero_std") for r in records]),
        "refinement_accuracy_last": interval([lately(r, "refinement/accuracy") for r in records]),
        "chosen_accuracy_last": interval([lately(r, "draft/chosen_accuracy") for r in records]),
        "copy_rate": interval([mean_of(r, "refinement/copy_rate") for r in records]),
        "copy_rate_first": interval([at_end(r, "refinement/copy_rate", 0) for r in records]),
        "copy_rate_last": interval([at_end(r, "refinement/copy_rate", -1) for r in records]),
        "answer_equals_draft": interval([r["answer_equals_draft"] for r in records]),
        "entropy_last": interval([at_end(r, "entropy", -1) for r in records]),
        "bare_entropy_first": interval([at_end(r, "bare/entropy", 0) for r in records]),
        "bare_entropy_last": interval([lately(r, "bare/entropy") for r in records]),
        "bare_entropy_at_equal_accuracy": interval([entropy_at_equal_accuracy(r, base[r["seed"]]) for r in shared]),
        "decoded_tokens": interval([r["totals"]["decoded_tokens"] for r in records]),
        "seconds_per_step": interval([mean_of(r, "step_time") for r in records]),
        "core_hours": interval([r["totals"]["core_seconds"] / 3600 for r in counted]),
        "samples_per_core_second": interval([r["totals"]["rollouts"] / r["totals"]["core_seconds"] for r in counted]),
        "peak_memory_gib": interval([r["totals"]["peak_memory_gib"] for r in records]),
    }


def difference(records: Sequence[dict], baseline: Sequence[dict]) -> dict[str, Any] | None:
    """Of accuracy at the end, over the seeds that both arms have."""
    base = {r["seed"]: r for r in baseline}
    shared = [r for r in records if r["seed"] in base]
    others = [base[r["seed"]] for r in shared]
    gaps = [outcome(r, "accuracy") - outcome(other, "accuracy") for r, other in zip(shared, others, strict=True)]
    return interval(gaps, paired_noise(shared, others, "accuracy"))


def paired_noise(records: Sequence[dict], others: Sequence[dict], key: str) -> float:
    """Half width that the answers alone give a mean difference of two arms; of an arm from itself none."""
    if records == others:
        return 0.0
    return sampling_error(*([answer_variance(r, key) for r in arm] for arm in (records, others)))


def halfway(record: dict) -> float:
    """Accuracy at the first evaluation after at least half of the steps."""
    points = record["evaluations"]
    return next(e["accuracy"] for e in points if 2 * e["step"] >= points[-1]["step"])


def known(record: dict, name: str) -> list[float]:
    """A curve without the steps that have no such figure; empty for a run that has none at all."""
    return [value for value in record["series"].get(name, []) if value is not None]


def mean_of(record: dict, name: str) -> float | None:
    values = known(record, name)
    return fmean(values) if values else None


def lately(record: dict, name: str) -> float | None:
    """Mean of the last three steps that have the figure."""
    values = known(record, name)[-3:]
    return fmean(values) if values else None


def at_end(record: dict, name: str, end: int) -> float | None:
    """The first (0) or last (-1) step that has the figure."""
    values = known(record, name)
    return values[end] if values else None


def outcome(record: dict, key: str) -> float | None:
    """A figure of the last evaluation; None where the run had no such reward."""
    return record["evaluations"][-1][key]


def at_equal_tokens(record: dict, baseline: dict) -> float:
    """Accuracy minus the baseline's, both read where the one that decoded fewer tokens ended."""
    budget = min(r["evaluations"][-1]["decoded_tokens"] for r in (record, baseline))
    return accuracy_at(record, budget) - accuracy_at(baseline, budget)


def entropy_at_equal_accuracy(record: dict, baseline: dict) -> float | None:
    """Entropy on the bare prompt at the end, minus the baseline's when it had first come as far as this run ended; None
    where it never had, or nothing was learnt."""
    ends, before = outcome(record, "accuracy"), record["evaluations"][0]["accuracy"]
    mine, others = known(record, "bare/entropy"), known(baseline, "bare/entropy")
    points = [(e["step"], e["accuracy"]) for e in baseline["evaluations"]]
    for (s0, a0), (s1, a1) in pairwise(points):
        if ends > before and a0 < ends <= a1 and mine and others:
            step = round(s0 + (s1 - s0) * (ends - a0) / (a1 - a0))
            return fmean(mine[-5:]) - fmean(others[max(step - 3, 0) : step + 2])
    return None


def accuracy_at(record: dict, tokens: float) -> float:
    """Accuracy after so many decoded tokens, linear between evaluations."""
    points = [(e["decoded_tokens"], e["accuracy"]) for e in record["evaluations"]]
    for (t0, a0), (t1, a1) in pairwise(points):
        if t0 <= tokens <= t1:
            return a0 + (a1 - a0) * (tokens - t0) / max(t1 - t0, 1)
    return points[-1][1]


def answer_variance(record: dict, key: str, end: int = -1) -> float:
    """Variance that a figure of the first (0) or last (-1) evaluation has from the choice of its answers alone."""
    evaluation = record["evaluations"][end]
    samples = evaluation["samples"]
    shares = [p for name in SHARES[key] if (p := evaluation[name]) is not None]
    return sum(math.sqrt(share_variance(p, samples)) for p in shares) ** 2


def share_variance(p: float, answers: int) -> float:
    """Variance of a share of so many answers; of none or all of them, as if half an answer more were the other way."""
    least = 0.5 / (answers + 1)
    p = min(max(p, least), 1 - least)
    return p * (1 - p) / answers


def sampling_error(*arms: Sequence[float]) -> float:
    """95 % half width that the answers alone give a mean over an arm's seeds, from their variances; or the difference
    of two such means where two arms are given."""
    return 1.96 * math.sqrt(sum(map(sum, arms))) / max(len(arms[0]), 1)


def student_t95(degrees: int) -> float:
    if degrees <= len(T95):
        return T95[degrees - 1]
    z = 1.959964  # the normal's quantile, and the first terms of its expansion in 1 / degrees
    series = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / degrees**power for power, term in enumerate(series))


def p_value(figure: dict[str, Any]) -> float:
    """Two-sided p that belongs to a figure's interval: Student's t, as wide as the interval; 1 where there is none."""
    if figure["half_width"] is None:
        return 1.0
    if not figure["half_width"]:
        return float(not figure["mean"])
    degrees = figure["n"] - 1
    angle = math.atan(student_t95(degrees) * abs(figure["mean"]) / figure["half_width"] / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for step in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * step / (step + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


def detectable(figure: dict[str, Any], level: float = 0.05) -> float:
    """The true difference that seeds with this interval would have shown four times in five, p below ``level``."""
    n = figure["n"]
    of_95 = student_t95(n - 1)

    def p_of(t: float) -> float:
        return p_value({"mean": t, "half_width": of_95, "n": n})

    critical = crossing(lambda t: level - p_of(t))
    return figure["half_width"] / of_95 * crossing(lambda shift: power(shift, critical, n - 1) - 0.8)


def power(shift: float, critical: float, degrees: int) -> float:
    """How often Student's t exceeds ``critical`` where the mean is ``shift`` standard errors: the normal's share beyond
    it, averaged over the deviation s that the sample happens to have (of true deviation 1)."""
    scale = math.log(2) + degrees / 2 * math.log(degrees / 2) - math.lgamma(degrees / 2)
    total, width = 0.0, 0.005
    for i in range(round(6 / width)):
        s = (i + 0.5) * width
        density = math.exp(scale + (degrees - 1) * math.log(s) - degrees * s * s / 2)
        total += width * density * (1 + math.erf((shift - critical * s) / math.sqrt(2))) / 2
    return total


def crossing(rising: Callable[[float], float]) -> float:
    """Where a function of positive numbers turns positive."""
    low, high = 0.0, 1.0
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: of several comparisons, the chance that any looks real by luck."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = highest
    return corrected


def interval(values: Sequence[float | None], at_least: float = 0.0) -> dict[str, Any] | None:
    """Mean and 95 % half width (None with one seed) of one figure per seed; None where no run has it.

    Args:
        at_least: half width that is not gone below.
    """
    found = [v for v in values if v is not None and not math.isnan(v)]
    if not found:
        return None
    n = len(found)
    half = max(student_t95(n - 1) * stdev(found) / math.sqrt(n), at_least) if n > 1 else None
    return {"mean": round(fmean(found), 6), "half_width": None if half is None else round(half, 6), "n": n}


def show(figure: dict[str, Any] | None, factor: float) -> str:
    """``73.4 ± 2.1``; without the interval where there is one seed, a dash where there is nothing."""
    if figure is None:
        return "–"
    digits = 1 if factor == 100 else 2
    half = "" if figure["half_width"] is None else f" ± {figure['half_width'] * factor:.{digits}f}"
    return f"{figure['mean'] * factor:.{digits}f}{half}"
