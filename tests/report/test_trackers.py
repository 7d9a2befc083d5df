"""Trackers get what metrics.jsonl gets; one that cannot work is refused before the run begins."""

from __future__ import annotations

import json

import pytest

from igrpo.config.train_config import TrainConfig
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
