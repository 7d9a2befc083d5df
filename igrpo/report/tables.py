"""The tables of the report: results and resources per arm, and the settings that differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev

from igrpo.report.arms import Arm, config_diff
from igrpo.report.runs import Run, Series

Cell = str
Table = tuple[list[str], list[list[Cell]]]
"""Header and rows; every cell is plain text, escaped where it is put into the page."""
NOTHING = "–"


def results(arms: Sequence[Arm]) -> Table:
    return _table(arms, {
        "arm": lambda arm: arm.label,
        "runs": lambda arm: str(len(arm.runs)),
        "steps": _steps,
        "bare-prompt accuracy": lambda arm: _before_after(arm, "eval/accuracy"),
        "reward, last tenth": _each(lambda run: late(run.series("reward")), "{:.3f}"),
        "refinement accuracy, last tenth": _each(lambda run: late(run.series("refinement/accuracy")), "{:.1%}"),
        "completion length": _each(lambda run: late(run.series("completions/mean_length")), "{:.1f} tokens"),
        "cut": _each(lambda run: late(run.series("completions/clipped_ratio")), "{:.1%}"),
    })  # fmt: skip


def resources(arms: Sequence[Arm]) -> Table:
    """As the paper's resource table has them, and what makes them up."""
    sampled = ("rollout/draft_tokens", "rollout/refinement_tokens")
    adapted = any(run.config.get("use_peft") for arm in arms for run in arm.runs)
    return _table(arms, {
        "arm": lambda arm: arm.label,
        "peak memory": _each(lambda run: highest(run.series("peak_memory_gib")), "{:.2f} GiB"),
        "samples/s": _each(samples_per_second, "{:.2f}"),
        "tokens/s": _each(lambda run: middle(run.series("rollout/tokens_per_second")), "{:,.0f}"),
        "step time": _each(lambda run: middle(run.series("step_time")), "{:.2f} s"),
        "rollout share": _each(rollout_share, "{:.0%}"),
        **({"adapters": _adapters} if adapted else {}),
        "weight push": _each(lambda run: middle(run.series("sync/seconds")), "{:.2f} s"),
        "sent by it": _each(lambda run: middle(run.series("sync/mib")), "{:,.1f} MiB"),
        "tokens sampled": _each(lambda run: _sum(run, *sampled), "{:,.0f}"),
        "learner tokens": _each(lambda run: _sum(run, "learner/unique_tokens"), "{:,.0f}"),
        "hours": _hours,
    })  # fmt: skip


def settings(runs: Sequence[Run]) -> Table:
    """Keys that differ, one column per run."""
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    rows = [[key, *(NOTHING if v is ... else str(v) for v in row)] for key, row in config_diff(runs).items()]
    return ["key", *labels], rows


def late(points: Series) -> float | None:
    """Mean over the last tenth of the steps: one step of a small batch says little."""
    return fmean(v for _, v in points[-max(1, len(points) // 10) :]) if points else None


def middle(points: Series) -> float | None:
    return median(v for _, v in points) if points else None


def highest(points: Series) -> float | None:
    return max(v for _, v in points) if points else None


def samples_per_second(run: Run) -> float | None:
    """Problems per second of the whole step, each with everything drawn for it: the reading with which the rates and
    the hours of the paper's table both come to the 7,500 problems of its epoch.
    """
    columns = [dict(run.series(f"rollout/{name}")) for name in ("samples_per_second", "seconds", "rollouts_per_prompt")]
    times = dict(run.series("step_time"))
    steps = set(times).intersection(*columns)
    if not steps:
        return None
    rate, seconds, per_prompt = columns
    return sum(rate[s] * seconds[s] / per_prompt[s] for s in steps if per_prompt[s]) / sum(times[s] for s in steps)


def rollout_share(run: Run) -> float | None:
    whole = dict(run.series("step_time"))
    shares = [min(1.0, v / whole[s]) for s, v in run.series("rollout/seconds") if whole.get(s)]
    return fmean(shares) if shares else None


def total_hours(points: Series) -> float | None:
    """The counter starts again at 0 when a run is resumed: the parts are added up."""
    total, previous = 0.0, 0.0
    for _, value in points:
        total += value - previous if value >= previous else value
        previous = value
    return total if points else None


def _hours(arm: Arm) -> Cell:
    for key, unit in (("gpu_hours", "GPU-h"), ("core_hours", "core-h")):
        if arm.has(key):
            spent = max(total_hours(run.series(key)) or 0.0 for run in arm.runs)
            form = "{:.1f} " if spent >= 10 else "{:.3f} " if spent >= 0.1 else "{:.4f} "
            return _over(arm, lambda run, key=key: total_hours(run.series(key)), form + unit)
    return NOTHING


def _adapters(arm: Arm) -> Cell:
    """Their rank, and how they travel."""
    kinds = {
        f"rank {run.config.get('lora_r')}, {'alone' if run.config.get('lora_sync') == 'adapter' else 'merged'}"
        for run in arm.runs
        if run.config.get("use_peft")
    }
    return " / ".join(sorted(kinds)) or NOTHING


def _sum(run: Run, *metrics: str) -> float | None:
    """Over all steps; where only every so many were logged, their mean stands for the others."""
    means = [fmean(v for _, v in run.series(metric)) for metric in metrics if run.series(metric)]
    return sum(means) * run.steps if means else None


def _table(arms: Sequence[Arm], columns: dict[str, Callable[[Arm], Cell]]) -> Table:
    return list(columns), [[cell(arm) for cell in columns.values()] for arm in arms]


def _each(figure: Callable[[Run], float | None], form: str) -> Callable[[Arm], Cell]:
    return lambda arm: _over(arm, figure, form)


def _over(arm: Arm, figure: Callable[[Run], float | None], form: str) -> Cell:
    """Mean over the arm's runs, ± the standard deviation where there are several."""
    values = [value for run in arm.runs if (value := figure(run)) is not None]
    if not values:
        return NOTHING
    mean = form.format(fmean(values))
    number, unit, rest = mean.partition(" ")
    if len(values) == 1:
        return mean
    spread = form.partition(" ")[0].format(stdev(values))
    return f"{number} ± {spread}{unit}{rest}"


def _before_after(arm: Arm, metric: str) -> Cell:
    if not arm.has(metric):
        return NOTHING
    before = _over(arm, lambda run: run.series(metric)[0][1] if run.series(metric) else None, "{:.1%}")
    return f"{before} → {_over(arm, lambda run: run.last(metric), '{:.1%}')}"


def _steps(arm: Arm) -> Cell:
    done = sorted({run.steps for run in arm.runs})
    asked = [run.config.get("max_steps") for run in arm.runs]
    goal = f" of {asked[0]}" if isinstance(asked[0], int) and asked.count(asked[0]) == len(asked) else ""
    text = str(done[0]) if len(done) == 1 else f"{done[0]} to {done[-1]}"
    return text if goal in (" of -1", f" of {text}") else text + goal
