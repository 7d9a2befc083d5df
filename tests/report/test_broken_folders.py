"""A report of whatever a kill, a full disk or an editor has left: a page with notes, or one sentence; no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from igrpo.report.arms import group_runs
from igrpo.report.command import main
from igrpo.report.runs import read_run
from igrpo.report.tables import settings

DEEP, LONG = "[" * 3000, "9" * 5000
LINES = [
    "null", "[1]", "{}", '{"step": null}', '{"step": "x"}', '{"step": 1e999}', '{"step": NaN}', '{"step": true}', DEEP,
    '{"a":' * 3000, LONG, f'{{"step": {LONG}}}', f'{{"step": 1{"0" * 400}, "reward": 1}}', '{"step": -5, "reward": 1}',
    f'{{"step": 2, "reward": 1{"0" * 400}}}', '{"step": 2, "reward": -1e308}', '{"step": 1.5, "reward": [1]}', "\0",
]  # fmt: skip
ODD = [
    None, True, -1, 1e308, 10**400, float("nan"), float("inf"), "", "\ud800", "1", [], [1], {}, {"a": 1}, [[]], "\0",
    {"value": None}, [None], "x" * 30_000,
]  # fmt: skip
CONFIGS = [
    "", "[]", "a: [", "seed: 2024-13-45", "seed: !!int x", DEEP, "max_steps: [1]\nalgorithm: {a: 1}", "1: 2",
    f"seed: {LONG}", "a: &a [*a]", f"max_steps: 1{'0' * 400}", "b: !!python/object:os.system x",
    "l0: &l0 [1,1,1,1,1,1,1,1,1]\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12)),
]  # fmt: skip
SUMMARY = {
    "rows": [{
        "model": "igrpo-1/checkpoint-3", "mode": "single shot",
        "benchmarks": {"gsm8k": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "n": 2, "problems": 4,
                                 "pass_at_k": [{"k": k, "value": 0.5, "low": 0.4, "high": 0.6} for k in (1, 2)]}},
    }]
}  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(part, (*path, key))
    return found


def replaced(value: Any, path: tuple, odd: Any) -> Any:
    if not path:
        return odd
    value = json.loads(json.dumps(value))
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = odd
    return value


def spoilt_log(source: Path, target: Path, seed: int) -> None:
    """Every line, each with another value in another place, and lines that are no records between them."""
    lines = []
    for i, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        spots = places(record)[1:]
        for j in range(3):
            n = seed * 7 + i * 3 + j
            lines.append(json.dumps(replaced(record, spots[n * 11 % len(spots)], ODD[n % len(ODD)])))
        lines.append(LINES[(seed * 5 + i) % len(LINES)])
    target.write_text("\n".join(lines) + '\n{"step": 9, "x": "é', encoding="utf-8", errors="surrogatepass")
    target.write_bytes(target.read_bytes()[:-1])  # the cut is inside a character


@pytest.mark.parametrize("seed", range(3))
def test_a_spoilt_run_gives_a_page_with_notes(runs, tmp_path, seed):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "completions.jsonl", "timeline.jsonl"):
        spoilt_log(runs[1] / name, folder / name, seed)
    spots = places(SUMMARY)
    for i in range(4):
        (folder / f"eval-{i}").mkdir()
        n = seed * 4 + i
        text = json.dumps(replaced(SUMMARY, spots[n * 5 % len(spots)], ODD[n % len(ODD)]))
        (folder / f"eval-{i}" / "summary.json").write_text(text if i else [DEEP, "null", '{"rows": null}'][seed % 3])
    (folder / "config.yaml").write_text(CONFIGS[6 + seed])
    assert main([str(folder), str(runs[2]), "--no-png", "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "left out" in page and "the last line is cut off" in page


@pytest.mark.parametrize("config", CONFIGS, ids=map(str, range(len(CONFIGS))))
def test_settings_that_cannot_be_read_are_a_note(runs, tmp_path, config):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    (tmp_path / "config.yaml").write_text(config)
    spoilt = read_run(tmp_path)
    assert spoilt.last("reward") == 1.0 and all(note.isprintable() for note in spoilt.notes)
    (label, _) = (arm.label for arm in group_runs([spoilt, read_run(runs[2])]))
    assert len(label) < 500 and settings([spoilt, read_run(runs[2])])


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml"])
def test_a_file_that_is_a_folder_or_missing_is_a_note(runs, tmp_path, missing, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder, ignore=shutil.ignore_patterns("checkpoint-*", missing))
    (folder / missing).mkdir()
    assert main([str(folder), "--no-png"]) == 0
    assert missing.partition(".")[0] in (folder / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_sentence(runs, tmp_path, capsys):
    assert main([str(runs[1]), "--no-png", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
