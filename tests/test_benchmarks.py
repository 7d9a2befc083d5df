"""The benchmark suite itself: its guard, its gate, its clocks, and that its page is what its records say."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loop_tables, records, report, rollouts, tables, targets
from benchmarks.measure import Comparison, peak_extra_bytes
from benchmarks.problems import make_problem
from benchmarks.provider import Provider
from benchmarks.shapes import Shape, cases_of, minimum_bytes, minimum_flops
from igrpo_kernels import grpo_loss, linear_grpo_loss

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHAPE = Shape("toy", 2, 6, 50, 8, torch.float32)


# --- the guard


def made_up_rows(seed: int, scatter: float = 0.08, slower: float = 1.0) -> list[dict]:
    """One case of four providers over 12 rounds; a busy round is slow for everyone, as on a shared machine."""
    rng = random.Random(seed)
    times = {"floor": 2.0, "cpu": 4.0 * slower, "eager": 30.0, "compile": 18.0}
    busy = [math.exp(abs(rng.gauss(0, 0.5))) for _ in range(12)]
    return [
        {
            "op": "grpo_loss", "pass": "fwd+bwd", "impl": name, "provider": name, "shape": "s", "tokens": 8,
            "vocab": 9, "hidden": None, "dtype": "bfloat16", "variant": "token", "time_ms": value, "floor_ms": 2.0,
            "peak_extra_bytes": 10 * 2**20, "max_rel_error": 0.0, "note": "",
            "samples_ms": [value * b * math.exp(rng.gauss(0, scatter)) for b in busy],
        }
        for name, value in times.items()
    ]  # fmt: skip


def lost(now: list[dict], then: list[dict]) -> dict:
    return records.losses(records.changes(now, then, allowance=records.ALLOWANCE["cpu"]))


def test_the_guard_sees_a_planted_regression_whatever_the_noise():
    for seed in range(50):
        assert lost(made_up_rows(seed, slower=1.8), made_up_rows(1000 + seed))


def test_the_guard_takes_noise_for_noise():
    assert not any(lost(made_up_rows(seed), made_up_rows(1000 + seed)) for seed in range(200))
    assert not lost(made_up_rows(1, slower=0.5), made_up_rows(2))  # faster is welcome


def test_a_machine_that_is_slower_for_everyone_is_no_loss():
    now, then = made_up_rows(1), made_up_rows(2)
    for row in now:
        row["samples_ms"] = [3 * x for x in row["samples_ms"]]
    assert not lost(now, then)


def test_one_rival_that_became_faster_is_listed_and_is_no_loss_of_ours():
    now, then = made_up_rows(1), made_up_rows(2)
    eager = next(row for row in now if row["provider"] == "eager")
    eager["samples_ms"] = [x / 2 for x in eager["samples_ms"]]
    assert [c.other for c in records.changes(now, then, allowance=records.ALLOWANCE["cpu"]) if c.lost] == ["eager"]
    assert not lost(now, then)


def test_more_memory_is_a_loss():
    now = made_up_rows(1)
    now[1]["peak_extra_bytes"] = 11 * 2**20
    ((key, _),) = lost(now, made_up_rows(2)).items()
    assert key[1] == "cpu"


def test_peaks_of_two_runs_of_the_same_code_pass():
    now, then = made_up_rows(1), made_up_rows(2)
    now[1]["peak_extra_bytes"] = int(1.013 * then[1]["peak_extra_bytes"])
    assert not lost(now, then)


def test_a_pass_with_nothing_left_to_do_is_not_judged():
    now, then = made_up_rows(1, slower=0.02), made_up_rows(2, slower=0.005)
    assert not lost([r for r in now if r["impl"] != "floor"], [r for r in then if r["impl"] != "floor"])


TRIAL = """
import torch
from benchmarks.providers_logits import OURS, RIVALS
from benchmarks.shapes import Shape

def bench_trial(compare):
    chosen = [c for c in OURS + RIVALS if c.impl in ("cpu", "eager")]
    compare("grpo_loss", Shape("trial", 4, 16, 16_384, 8, torch.float32), "token", ("fwd", "bwd", "fwd+bwd"), chosen)
"""


def test_a_planted_regression_fails_the_whole_command(tmp_path):
    """The suite's own options on one small case: against its own record, and against one in which we were faster."""
    (tmp_path / "bench_trial.py").write_text(TRIAL)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", "--rootdir", ROOT,
               "-c", ROOT / "pyproject.toml", tmp_path / "bench_trial.py", "--seconds", "0.5"]  # fmt: skip

    def run(option: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"IGRPO_BENCHMARK_RESULTS": str(tmp_path)}
        return subprocess.run(
            [*command, option], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
        )

    done = run("--record")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*.json")
    record = records.load(path)
    for row in record["rows"]:
        if row["impl"] in records.OURS:
            row["samples_ms"] = [x / 4 for x in row["samples_ms"]]  # as if we had been four times faster
    records.save(record, path)
    done = run("--guard")
    assert done.returncode == 1
    assert "slower than the record, beyond noise" in done.stdout


def test_the_dry_run_walks_every_providers_path(tmp_path):
    """gpu_check on toy shapes: Liger's and TRL's Triton kernels run interpreted, and pass the gate like ours."""
    chosen = "(bench_loss and token and toy-10x96) or learner_step"
    command = [sys.executable, ROOT / "scripts" / "gpu_check.py", "--dry-run", "-k", chosen]
    done = subprocess.run(
        [*command, "--output", tmp_path / "record.json"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = records.load(tmp_path / "record.json")
    assert record["toy"] and [stage["name"] for stage in record["stages"]] == ["rest"]
    timed: dict[str, set[str]] = {}
    for row in record["rows"]:
        if row["time_ms"]:
            timed.setdefault(row["op"], set()).add(row["provider"])
    everywhere = {"floor", "triton", "cpu", "torch", "eager", "torch.compile"}
    assert timed["grpo_loss"] == everywhere | {"triton, in place", "cpu, in place", "trl", "liger", "liger, in place"}
    chunked = {"trl, chunked", "liger FusedLinearGRPO", "liger scaled CE", "cce, its torch_compile"}
    assert timed["linear_grpo_loss"] == everywhere | chunked | {"triton, one stream"}
    assert timed["learner_step"] == {"trl", "igrpo, padded", "igrpo, packed", "igrpo, packed, shared prefix"}


# --- the gate


def wrong_by(factor: float):
    """Right output, wrong gradient: only a comparison of gradients sees it."""

    def build():
        def forward(p):
            logps = torch.log_softmax(p.leaf, -1).gather(-1, p.ids[..., None])[..., 0]
            return {"logps": logps.detach() + factor * (logps - logps.detach())}

        return forward

    return build


def test_a_provider_with_a_wrong_gradient_gets_no_figure_but_its_error():
    problem = make_problem("selective_log_softmax", SHAPE, "logps", CPU)
    measurements = [Provider("right", "eager", wrong_by(1.0)), Provider("wrong", "liger", wrong_by(1.01))]
    comparison = Comparison(problem, measurements, ("fwd", "bwd", "fwd+bwd"))
    comparison.prepare()
    comparison.round()
    first = comparison.measurements[0].samples_ms["bwd"][0]
    comparison.discard()
    comparison.round()
    comparison.discard()
    comparison.round()
    rows = {(row["provider"], row["pass"]): row for row in comparison.rows()}
    assert rows["right", "bwd"]["first_ms"] == pytest.approx(first, rel=1e-3)
    assert len(rows["right", "bwd"]["samples_ms"]) == 1
    assert rows["right", "bwd"]["time_ms"] > 0 and rows["right", "bwd"]["max_rel_error"] < 1e-5
    assert rows["wrong", "bwd"]["time_ms"] is None
    assert rows["wrong", "bwd"]["max_rel_error"] == pytest.approx(0.01, rel=1e-3)
    assert rows["wrong", "bwd"]["note"] == "wrong: error 1.0e-02 exceeds 1e-03"


def test_a_provider_that_is_missing_or_raises_leaves_a_line_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such kernel\nsecond line")

    measurements = [
        Provider("absent", "quack", wrong_by(1.0), package="no_such_package", install="no-such-package"),
        Provider("device", "liger", wrong_by(1.0), cuda=True),
        Provider("broken", "trl", broken),
        Provider("right", "eager", wrong_by(1.0)),
    ]
    comparison = Comparison(make_problem("selective_log_softmax", SHAPE, "logps", CPU), measurements, ("fwd",))
    comparison.prepare()
    comparison.round()
    notes = {row["provider"]: row["note"] for row in comparison.rows()}
    assert notes == {
        "floor": "", "absent": "not installed (pip install no-such-package)", "device": "needs a CUDA device",
        "broken": "failed (RuntimeError: no such kernel)", "right": "",
    }  # fmt: skip


def test_in_place_providers_do_not_spoil_the_inputs_of_the_next():
    problem = make_problem("grpo_loss", SHAPE, "token", CPU)
    before = problem.pristine.clone()
    for extra_row in (False, True):
        problem.begin(extra_row)
        problem.leaf.data.fill_(float("nan"))
    problem.begin()
    assert torch.equal(problem.pristine, before) and torch.equal(problem.leaf, before)


@pytest.mark.parametrize(("op", "make"), [("grpo_loss", grpo_loss), ("linear_grpo_loss", linear_grpo_loss)])
@pytest.mark.parametrize("variant", ["gspo", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_sees_a_term_that_is_left_out(op, make, variant, dtype):
    """A token-level loss once passed for gspo, and one without its KL term for kl."""

    def provider(whole: bool):
        def forward(p):
            inputs = (p.leaf,) if p.weight is None else (p.leaf, p.weight)
            terms = {"config": p.config, "ref_per_token_logps": p.ref} if whole else {}
            out = make(*inputs, p.ids, p.advantages, old_per_token_logps=p.old, impl="torch", **terms)
            return {"loss": out.loss}

        return lambda: forward

    problem = make_problem(op, Shape("toy", 4, 16, 512, 32, dtype), variant, CPU)
    measurements = [Provider("whole", "torch", provider(True)), Provider("without", "eager", provider(False))]
    comparison = Comparison(problem, measurements, ("fwd+bwd",))
    comparison.prepare()
    comparison.round()
    notes = {row["provider"]: row["note"] for row in comparison.rows()}
    assert notes["whole"] == "" and notes["without"].startswith("wrong: error")


def test_the_gates_inputs_lie_on_both_sides_of_the_clip_range_and_the_clocks_do_not():
    problem = make_problem("grpo_loss", Shape("s", 4, 64, 50, 8, torch.float32), "token", CPU)
    logps = torch.log_softmax(problem.pristine, -1).gather(-1, problem.ids[..., None])[..., 0]
    ratio = torch.exp(logps - problem.gate_old)
    assert min((ratio < 0.8).sum(), (ratio > 1.2).sum(), ((ratio > 0.8) & (ratio < 1.2)).sum()) > 25
    assert (torch.exp(logps - problem.clock_old) - 1).abs().max() < 0.2


# --- clocks, memory, counts


def test_peak_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.empty(10 * 2**20, dtype=torch.int8)
        del a
        b = torch.empty(6 * 2**20, dtype=torch.int8)
        c = torch.empty(7 * 2**20, dtype=torch.int8)
        return b, c

    assert peak_extra_bytes(work, CPU) == pytest.approx(13 * 2**20, rel=0.01)


def test_bytes_and_flops_of_the_designs_example():
    shape = Shape("qwen2.5", 8, 1024, 151_936, 4096)
    assert minimum_bytes("grpo_loss", shape, "token")["fwd+bwd"] == 4 * shape.logits
    assert minimum_bytes("grpo_loss", shape, "gspo")["fwd+bwd"] == 6 * shape.logits
    assert minimum_bytes("selective_log_softmax", shape, "logps")["fwd"] == 2 * shape.logits
    assert minimum_flops("linear_grpo_loss", shape, "token")["fwd+bwd"] == 6 * 8192 * 4096 * 151_936


@pytest.mark.parametrize("kind", ["cuda", "cpu", "toy"])
def test_every_kind_of_machine_runs_every_operation_and_variant(kind):
    for op, cases in cases_of(kind).items():
        assert len(set(cases)) == len(cases)
        if op.endswith("grpo_loss"):
            assert {"token", "gspo", "kl", "entropy bonus", "cross entropy"} <= {variant for _, variant in cases}


# --- records and the page


def test_records_survive_the_disk_and_a_partial_run_replaces_only_its_cases(tmp_path):
    old = {"cpu": "x", "threads": 2, "commit": "1", "rows": made_up_rows(1)}
    other = copy.deepcopy(old["rows"])
    for row in other:
        row["variant"] = "gspo"
    records.save(old | {"rows": old["rows"] + other}, tmp_path / "r.json")
    back = records.load(tmp_path / "r.json")
    assert back["rows"] == json.loads(json.dumps(old["rows"] + other))
    merged = records.merge(back, old | {"commit": "2", "rows": made_up_rows(2)})
    assert [(row["variant"], row.get("commit")) for row in merged["rows"]] == [("gspo", "1")] * 4 + [
        ("token", None)
    ] * 4


def test_the_page_and_its_pictures_are_what_the_records_say():
    assert report.out_of_date(report.load_records()) == [], "run python -m benchmarks.report"


def test_a_changed_figure_makes_page_and_pictures_out_of_date(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "performance")
    head = dict.fromkeys(("torch", "triton", "driver", "commit", "date", "command", "uncommitted_changes"), "")
    found = [head | {"cpu": "some cpu", "threads": 2, "cores": 2, "load_average": [0, 0], "rows": made_up_rows(1)}]
    report.write(found)
    assert report.out_of_date(found) == []
    found[0]["rows"][2]["time_ms"] *= 2
    stale = [path.name for path in report.out_of_date(found)]
    assert stale[0] == "performance.md" and any(name.endswith("-time.svg") for name in stale)


def test_a_missed_target_is_listed():
    rows = [row | {"time_ms": 5.0 if row["impl"] == "eager" else row["time_ms"]} for row in made_up_rows(1)]
    lines = "\n".join(targets.section([{"cpu": "x", "rows": rows}]))
    assert "3 times faster than eager PyTorch in fp32. **Missed in 1 of 1:**" in lines
    assert "GPU: selective_log_softmax forward: at least 90 % of the copy's bandwidth. **Not measured.**" in lines


def made_up_run(folder: Path, seconds: float) -> Path:
    folder.mkdir()
    steps = [
        {"step_time": seconds, "rollout/seconds": seconds / 2, "rollout/draft_tokens": 100.0, "peak_memory_gib": 1.5,
         "rollout/refinement_tokens": 300.0, "rollout/samples_per_second": 64 / seconds, "core_hours": 0.25 * (i + 1),
         "rollout/rollouts_per_prompt": 8.0}
        for i in range(4)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [{"eval/accuracy": 0.5}, *steps])))
    return folder


def test_the_resource_table_has_the_papers_column_and_ours(tmp_path):
    runs = made_up_run(tmp_path / "grpo", 8.0), made_up_run(tmp_path / "igrpo", 10.0)
    lines = list(rollouts.resources(*runs))
    assert lines[4] == "| iGRPO against GRPO, paper | +0.0% | -17.1% | +13.0% |"
    assert lines[5] == "| grpo, ours | 1.61 | 0.5 | 1 |"  # 4 problems in 8 seconds, 4 quarters of an hour
    assert lines[7] == "| iGRPO against GRPO, ours | +0.0% | -20.0% | +0.0% |"


def test_schedules_become_rows_of_the_record(tmp_path):
    steps = rollouts.steps_of(made_up_run(tmp_path / "run", 8.0))
    rollout, step = rollouts.rows("igrpo streaming", steps, "tiny")
    assert (rollout["op"], rollout["time_ms"], rollout["samples"]) == ("rollout", 4000.0, 32)
    assert (rollout["tokens"], rollout["decoded_tokens"]) == (None, 400)
    assert (step["op"], step["time_ms"], step["peak_extra_bytes"]) == ("training_step", 8000.0, 1.5 * 2**30)
    text = "\n".join(loop_tables.section([rollout, step]))
    assert "| tiny | igrpo streaming | 4,000 | 1.00 | 100 | 8.00 |  | 1,536 |" in text
    longer = [s | {"rollout/refinement_tokens": 500.0} for s in steps]
    for name in ("grpo", rollouts.TRL):  # one case, however many tokens an arm happened to sample
        assert {records.case_key(row) for row in rollouts.rows(name, longer, "tiny")} == {
            records.case_key(row) for row in (rollout, step)
        }


def test_every_committed_record_can_be_printed_whole():
    """Rows of the training loop have neither one number of tokens nor a vocabulary, which ended a run's last table."""
    for path in records.COMMITTED.glob("*.json"):
        record = records.load(path)
        text = "\n".join(tables.terminal(record, None))
        assert record["rows"] and all(row["op"] in text for row in record["rows"])


def test_committed_records_have_the_rows_of_the_schema():
    names = {"op", "pass", "impl", "tokens", "vocab", "hidden", "dtype", "variant", "time_ms", "floor_ms",
             "peak_extra_bytes", "max_rel_error"}  # fmt: skip
    for record in report.load_records():
        assert {"torch", "triton", "driver", "commit", "date", "command", "rows", "load_average"} <= set(record)
        assert ("gpu" in record) != ("cpu" in record)
        assert all(names <= set(row) for row in record["rows"])
        assert not record.get("toy")
