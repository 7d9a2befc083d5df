"""Trackers get what metrics.jsonl gets; one that cannot work is refused before the run begins."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from accelerate import Accelerator

from igrpo.config.train_config import TrainConfig
from igrpo.run.trackers import show_table
from igrpo.settings import ConfigError
from igrpo.train import main


def test_tensorboard_files_hold_the_metrics(runs):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not list(runs[0].rglob("events.out.tfevents*"))  # report_to: none
    events = EventAccumulator(str(runs[1] / "igrpo"))
    events.Reload()
    logged = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "draft/accuracy", "eval/accuracy", "step_time"):
        expected = [(r["step"], r[name]) for r in logged if name in r]
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected] and len(seen) >= 2

    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [1, 2, 3]
    table = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| step | prompt | stage | completion | low_bytes | format | reward | advantage | tokens |"
    assert len(table) == 2 + 2 * (3 + 4) and {line.count(" | ") for line in table} == {8}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.needs_package(n)) for n in ("wandb", "trackio")])
def test_a_tracker_with_tables_gets_the_completions(name, tmp_path, monkeypatch):
    """The real one, offline."""
    for key, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("TRACKIO_DIR", tmp_path / "trackio")):
        monkeypatch.setenv(key, str(value))
    accelerator = Accelerator(cpu=True, log_with=name)
    accelerator.init_trackers("igrpo", init_kwargs={name: {"name": "n"}})
    row = {"step": 1, "prompt": "a|b", "stage": "draft", "completion": "c\nd", "reward": 0.5, "advantage": None}
    show_table(accelerator, "completions", [row, {**row, "advantage": 0.25}], 1)
    accelerator.end_training()
    if name == "wandb":
        (file,) = tmp_path.rglob("completions*.table.json")
        rows = [[*row.values()], [*row.values()]]
        rows[1][-1] = 0.25
        assert json.loads(file.read_text()) == {"columns": [*row], "data": rows}
    else:
        (file,) = (tmp_path / "trackio").glob("*.db")
        with closing(sqlite3.connect(file)) as database:
            ((text,),) = database.execute("select metrics from metrics where step = 1")
        table = json.loads(text)["completions"]
        assert table["_type"] == "trackio.table" and [one["completion"] for one in table["_value"]] == ["c\nd"] * 2


def test_an_unknown_tracker_is_a_mistake_in_the_settings():
    with pytest.raises(
        ConfigError, match="there is no tracker 'tensorbord'; write none, or some of tensorboard, wandb"
    ):
        TrainConfig(model_name_or_path="m", dataset_name="d", report_to="wandb, tensorbord")


def test_a_tracker_that_is_not_installed_ends_the_run_before_it_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": tmp_path / "run", "report_to": "trackio"}
    assert main([word for key, value in arguments.items() for word in (f"--{key}", str(value))]) == 2
    assert capsys.readouterr().err == (
        "error: report_to: trackio is not installed; pip install trackio, or write none "
        "(metrics.jsonl is always written)\n"
    )
    assert not (tmp_path / "run").exists()
