"""Targets beside what the records show: met, missed by how much, or not measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks import learner_step, records, tables


@dataclass(frozen=True)
class Target:
    """`met` judges one case's rows: (what was found, whether it is enough), or None where it does not apply."""

    name: str
    machine: str  # "gpu" or "cpu"
    found: Callable[[tuple, list[dict]], tuple[str, bool] | None]


def floor_share(op: str, variants: tuple[str, ...], share: float, impl: str | None = None, against: float = 1.0):
    """% of floor of our best (or of one implementation) at least `share`; `against` scales the recorded floor."""

    def found(case: tuple, rows: list[dict]) -> tuple[str, bool] | None:
        passed = tables.whole_passes(case)[0]  # log-probs without gradient; a loss with it
        mine = [r for r in rows if r["pass"] == passed and r["time_ms"] and r["floor_ms"]
                and (r["impl"] == impl if impl else r["impl"] in records.OURS)]  # fmt: skip
        if case[0] != op or case[-1] not in variants or not mine:
            return None
        best = max(against * r["floor_ms"] / r["time_ms"] for r in mine)
        return f"{100 * best:.0f} %", best >= share

    return found


def speed_up(over: str, least: float):
    """grpo_loss, forward + backward: that many times faster than a peer."""

    def found(case: tuple, rows: list[dict]) -> tuple[str, bool] | None:
        ours = tables.best_of_ours(rows, "fwd+bwd")
        theirs = next((r["time_ms"] for r in rows if r["provider"] == over and r["pass"] == "fwd+bwd"), None)
        if case[0] != "grpo_loss" or case[-1] != "token" or not (ours and theirs):
            return None
        return f"{theirs / ours:.2f} times", theirs / ours >= least

    return found


def lighter_than_trl(case: tuple, rows: list[dict]) -> tuple[str, bool] | None:
    ratios = learner_step.beside_trl(rows)
    if ratios is None:
        return None
    speed, memory = ratios
    found = f"{speed:.1f} times faster, {memory:.1f} times lower peak"
    return found, speed >= learner_step.LEAST_SPEED_UP and memory > 1


def ahead_of_all(case: tuple, rows: list[dict]) -> tuple[str, bool] | None:
    behind = list(tables.behind_rivals(rows))
    peers = [r for r in rows if r["impl"] not in (*records.OURS, "floor") and r["time_ms"]]
    if not peers or case[-1] == "new lengths":
        return None
    return "; ".join(line.rpartition(": ")[2] for line in behind) or "ahead", not behind


TARGETS = (
    Target("selective_log_softmax forward: at least 90 % of the copy's bandwidth", "gpu",
           floor_share("selective_log_softmax", ("logps", "entropy"), 0.9)),
    Target("grpo_loss, token level: at least 85 % of the 4 B floor with csrc", "gpu",
           floor_share("grpo_loss", ("token",), 0.85, impl="cuda")),
    Target("grpo_loss, token level: at least 90 % of the 6 B floor with Triton", "gpu",
           floor_share("grpo_loss", ("token",), 0.9, impl="triton", against=1.5)),
    Target("grpo_loss, GSPO: at least 90 % of the 6 B floor", "gpu", floor_share("grpo_loss", ("gspo",), 0.9)),
    Target("linear_grpo_loss: at least 90 % of the bare matmuls' speed", "gpu",
           floor_share("linear_grpo_loss", ("token",), 0.9)),
    Target("faster than every peer", "gpu", ahead_of_all),
    Target("learner step at least 1.5 times faster than TRL's, at a lower peak", "gpu", lighter_than_trl),
    Target("grpo_loss at least 3 times faster than eager PyTorch in fp32", "cpu", speed_up("eager", 3.0)),
    Target("grpo_loss faster than torch.compile", "cpu", speed_up("torch.compile", 1.0)),
    Target("faster than every peer", "cpu", ahead_of_all),
    Target("learner step at least 1.5 times faster than TRL's, at a lower peak", "cpu", lighter_than_trl),
)  # fmt: skip


def section(found: list[dict]) -> Iterable[str]:
    """A line per target; misses are listed one by one."""
    for target in TARGETS:
        holding = [record for record in found if target.machine in record]
        results = [(case, result) for record in holding
                   for case, rows in tables.grouped(judged_rows(record)).items()
                   if (result := target.found(case, rows)) is not None]  # fmt: skip
        where = "GPU" if target.machine == "gpu" else "CPU"
        if not results:
            yield f"* {where}: {target.name}. **Not measured.**"
            continue
        missed = [(case, text) for case, (text, enough) in results if not enough]
        values = ", ".join(text for _, (text, _) in results[:4]) if not missed else ""
        if not missed:
            yield f"* {where}: {target.name}. Met in {len(results)} of {len(results)} ({values})."
            continue
        yield f"* {where}: {target.name}. **Missed in {len(missed)} of {len(results)}:**"
        yield from (f"  * {tables.title(case, {})}: {text}" for case, text in missed)
    yield ""


def judged_rows(record: dict) -> list[dict]:
    return [row for row in record["rows"] if row["pass"] in ("fwd", "bwd", "fwd+bwd") or row["op"] == "learner_step"]
