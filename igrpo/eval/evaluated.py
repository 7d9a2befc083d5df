"""The models that are evaluated: runs, checkpoints, folders and names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from igrpo.config.recipe import build_config, read_yaml
from igrpo.config.train_config import TrainConfig
from igrpo.run.checkpoints import saved_models
from igrpo.run.output_folder import is_run
from igrpo.settings import ConfigError


@dataclass(frozen=True)
class EvaluatedModel:
    name: str
    """As the table shows it."""
    path: str
    """What transformers and vLLM load."""
    run_config: TrainConfig | None
    """Settings of the run it is a checkpoint of."""


def find_model(name: str) -> EvaluatedModel:
    """A run (its last checkpoint), a checkpoint of a run, or any model that ``resolve_model`` knows."""
    from igrpo.models.loading import resolve_model

    folder = Path(name).expanduser()
    saved = saved_models(folder)
    if (folder / "metrics.jsonl").is_file() or saved:
        if not saved:
            raise ConfigError(f"model: the run {name} has no checkpoint yet")
        folder = saved[-1]
    if folder.name.startswith("checkpoint-") and is_run(folder.parent):
        run_config = build_config(read_yaml(str(folder.parent / "config.yaml")))
        return EvaluatedModel(f"{folder.parent.name}/{folder.name}", resolve_model(str(folder)), run_config)
    return EvaluatedModel(name.rstrip("/"), resolve_model(name), None)
