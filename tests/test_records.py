"""The committed records of the experiments: one per run, and summaries and pictures that say what they say."""

from __future__ import annotations

from experiments.figures import digest
from experiments.plan import RESULTS, fingerprint, load_plan
from experiments.record import load_records, read_json, record_of, write_json
from experiments.summary import summarise

PLANNED = sorted(path.parent for path in RESULTS.glob("*/runs.json"))


def test_there_is_one_record_per_run_and_each_is_pointed_to():
    pointed = set()
    for folder in PLANNED:
        plan = load_plan(folder.name)
        for arm, seeds in read_json(folder / "runs.json").items():
            for seed, run in seeds.items():
                settings = read_json(record_of(folder, run))["settings"]
                asked = plan.arms[arm] | {"seed": int(seed)}
                assert {key: settings[key] for key in asked} == asked and fingerprint(settings) == run
                pointed.add(run)
    assert pointed == {path.stem for path in (RESULTS / "runs").iterdir()}


def test_a_record_has_a_line_per_setting_curve_and_figure(tmp_path):
    for path in [*RESULTS.rglob("*.json")]:
        write_json(tmp_path / path.name, read_json(path))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path
    lines = next((RESULTS / "runs").iterdir()).read_text().splitlines()
    assert len(lines) < 80 and any(line.startswith('  "reward": [') and line.endswith("],") for line in lines)


def test_a_summary_is_what_its_records_say(tmp_path):
    (tmp_path / "runs").symlink_to(RESULTS / "runs")
    for folder in PLANNED:
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / "runs.json").write_bytes((folder / "runs.json").read_bytes())
        written = summarise(tmp_path / folder.name, load_plan(folder.name))
        assert written.read_text() == (folder / "summary.json").read_text()


def test_pictures_are_drawn_from_the_records_beside_them():
    for folder in PLANNED:
        wanted = digest(load_records(folder))
        for name in ("outcome", "course"):
            assert wanted in (folder / f"{name}.svg").read_text(), f"run: python -m experiments {folder.name}"
