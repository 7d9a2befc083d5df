"""Run folders as they are in life: cut, incomplete, resumed, of an older version, several seeds."""

from __future__ import annotations

import json

import pytest
import yaml

from igrpo.eval.summary import make_row, merge
from igrpo.report.arms import group_runs
from igrpo.report.benchmarks import row_colours
from igrpo.report.command import main, write_report
from igrpo.report.drawing import MUTED, colour_of, smooth, thin
from igrpo.report.runs import read_run
from igrpo.report.tables import resources, results, total_hours
from igrpo.report.timeline import in_flight, last_spans
from igrpo.run.timeline import Span, read_spans


def folder(path, records, config=None, cut=""):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + cut)
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def test_a_line_cut_by_a_kill_is_left_out_and_said_so(tmp_path):
    run = read_run(folder(tmp_path / "a", [{"step": 1, "reward": 0.5}], {}, cut='{"step": 2, "rew'))
    assert run.series("reward") == [(1, 0.5)]
    assert any("the last line is cut off" in note for note in run.notes)


def test_values_that_are_no_numbers_leave_a_gap_and_a_note(tmp_path):
    records = [{"step": s, "grad_norm": float("nan") if s == 2 else 1.0, "device": "cpu"} for s in (1, 2, 3)]
    run = read_run(folder(tmp_path / "a", [*records, {"reward": 1.0}], {}))
    assert run.series("grad_norm") == [(1, 1.0), (3, 1.0)] and not run.series("device")
    assert any("grad_norm is no finite number at 1 steps, first at step 2" in note for note in run.notes)
    assert any("1 lines have no step" in note for note in run.notes)


def test_a_run_that_was_resumed_counts_each_step_once(tmp_path):
    run = read_run(folder(tmp_path / "a", [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0},
                                           {"step": 2, "reward": 3.0}], {}))  # fmt: skip
    assert run.series("reward") == [(1, 1.0), (2, 3.0)]
    assert total_hours([(1, 0.5), (2, 1.0), (3, 0.25), (4, 0.75)]) == 1.75  # the counter began again at step 3


def test_what_is_missing_is_named_and_the_rest_is_drawn(tmp_path):
    run = folder(tmp_path / "old", [{"step": s, "reward": s / 10} for s in range(1, 4)])
    page = write_report([run], None, png=False)
    html = page.read_text()
    assert 'id="figure-reward"' in html and 'id="figure-entropy"' not in html
    for part in ("config.yaml is missing", "completions.jsonl is missing", "no data for: bare-prompt accuracy"):
        assert part in html
    assert "extensions of the second stage" not in html, "nobody asked for them"


def test_an_empty_run_still_gives_a_page(tmp_path):
    assert "holds no figures" in write_report([folder(tmp_path / "new", [])], None).read_text()


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no metrics.jsonl")


def seeds(tmp_path):
    runs = []
    for algorithm, rewards in (("grpo", (0.2, 0.4)), ("igrpo", (0.5,))):
        for seed, reward in enumerate(rewards):
            records = [{"step": s, "reward": reward * s, "step_time": 4.0, "core_hours": s / 10,
                        "rollout/samples_per_second": 32.0, "rollout/seconds": 2.0, "rollout/rollouts_per_prompt": 8.0,
                        "sync/seconds": 0.5, "sync/mib": 3.0}
                       for s in (1, 2)]  # fmt: skip
            config = {"algorithm": algorithm, "seed": seed, "output_dir": f"{algorithm}-{seed}", "max_steps": 2}
            config |= {"use_peft": algorithm == "igrpo", "lora_r": 8, "lora_sync": "adapter"}
            runs.append(read_run(folder(tmp_path / f"{algorithm}-{seed}", records, config)))
    return group_runs(runs)


def test_runs_that_differ_only_in_the_seed_are_one_band(tmp_path):
    grpo, igrpo = seeds(tmp_path)
    assert (grpo.label, len(grpo.runs), igrpo.label, len(igrpo.runs)) == ("grpo", 2, "igrpo", 1)
    band = grpo.band("reward")
    assert band.mean == [(1, pytest.approx(0.3)), (2, pytest.approx(0.6))]
    assert band.spread == pytest.approx([0.02**0.5, 0.08**0.5])  # sample deviation of 0.2, 0.4 and of 0.4, 0.8
    assert igrpo.band("reward").spread is None


def test_arms_are_named_by_what_differs(tmp_path):
    configs = [{"algorithm": a, "beta": b, "seed": 1} for a, b in (("grpo", 0.0), ("igrpo", 0.0), ("igrpo", 0.1))]
    runs = [read_run(folder(tmp_path / f"{i}", [{"step": 1, "reward": 1}], c)) for i, c in enumerate(configs)]
    assert [arm.label for arm in group_runs(runs)] == ["grpo, beta 0.0", "igrpo, beta 0.0", "igrpo, beta 0.1"]


def test_tables_by_hand(tmp_path):
    arms = seeds(tmp_path)
    assert results(arms)[1][0][:5] == ["grpo", "2", "2", "–", "0.600 ± 0.283"]
    row = dict(zip(resources(arms)[0], resources(arms)[1][1], strict=True))
    assert (row["samples/s"], row["step time"], row["hours"]) == ("2.00", "4.00 s", "0.200 core-h")
    assert (row["adapters"], row["weight push"], row["sent by it"]) == ("rank 8, alone", "0.50 s", "3.0 MiB")
    assert "adapters" not in resources(arms[:1])[0]


def test_long_runs_keep_their_spikes_and_few_points():
    points = [(s, 0.0) for s in range(10_000)]
    points[4321] = (4321, 9.0)
    few = thin(points)
    assert len(few) <= 410 and (4321, 9.0) in few and few[0] == points[0] and few[-1] == points[-1]
    assert max(v for _, v in smooth(points)) == pytest.approx(9.0 / 501)


def test_timeline_keeps_the_last_steps_and_counts_requests_in_flight(tmp_path):
    events = []
    for step in range(1, 7):
        for i, (start, end) in enumerate(((0, 2), (1, 3))):
            for t, event in ((start, "start"), (end, "end")):
                events.append({"t": 10 * step + t, "step": step, "stage": "draft", "event": event, "id": f"{step}/{i}"})
    path = tmp_path / "timeline.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"no": "event"}\n{"t": 99, "st')
    steps, spans = last_spans(path, [])
    assert steps == [4, 5, 6] and len(spans) == 6 and spans[0] == Span("draft", 4, "4/0", 40, 42, 0)
    assert len(read_spans(path)) == 12 and read_spans(path)[-6:] == spans
    assert in_flight([(0, 2), (1, 3)]) == ([0, 1, 2, 3], [1, 2, 1, 0])
    assert in_flight([(1, 3)], [0, 1, 2, 3]) == ([0, 1, 2, 3], [0, 1, 1, 0])


def test_evaluations_become_bars_and_pass_at_k(tmp_path):
    def records(right):
        rewards = [{"reward": float(r), "rewards": {"accuracy": float(r)}, "tokens": 9, "finish_reason": "stop"}
                   for r in right]  # fmt: skip
        return [{"row": 0, "correct": sum(right), "score": sum(right) / len(right), "completions": rewards}] * 3

    run = folder(tmp_path / "igrpo", [{"step": 1, "reward": 1.0}], {"algorithm": "igrpo"})
    other = folder(tmp_path / "grpo", [{"step": 1, "reward": 1.0}], {"algorithm": "grpo"})
    (tmp_path / "eval").mkdir()
    rows = [make_row(name, mode, {"gsm8k": records(right)}, 0)
            for name, mode, right in (("smollm2-135m", "single shot", (0, 0, 1, 0)),
                                      (f"{run}/checkpoint-2", "single shot", (1, 0, 1, 1)),
                                      (f"{run}/checkpoint-2", "two-stage", (1, 1, 1, 1)))]  # fmt: skip
    merge(tmp_path / "eval", rows)
    html = write_report([other, run, tmp_path / "eval"], tmp_path / "r.html", png=False).read_text()
    assert 'id="figure-benchmarks"' in html and 'id="figure-pass_at_k"' in html and ">75.0<" in html
    arms = group_runs([read_run(other), read_run(run)])
    assert row_colours(rows, arms) == [MUTED, colour_of(1), colour_of(1)]  # a checkpoint has its run's colour
    (tmp_path / "eval" / "summary.json").write_text('{"rows": [{"model": "m"}]}')
    broken = write_report([run, tmp_path / "eval"], tmp_path / "r.html", png=False).read_text()
    assert "cannot be read as an evaluation" in broken and 'id="figure-benchmarks"' not in broken
