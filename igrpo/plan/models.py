"""A model's sizes: from its folder, from the hub, or from a small table of public figures where neither is there."""

from __future__ import annotations

import json
import socket
import urllib.parse
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from igrpo.config.train_config import TrainConfig
from igrpo.plan.shapes import Counted, ModelShape, has_experts, model_shape
from igrpo.settings import ConfigError, did_you_mean

TABLE = Path(__file__).with_name("architectures.json")
HUB_SECONDS = 5.0
STATE_SPACE = ("hybrid_override_pattern", "ssm_state_size", "mamba_d_state", "state_size")
"""Keys of configs whose models are no plain transformers."""


@lru_cache
def find_shape(name: str) -> tuple[ModelShape, str]:
    """The shape, and where it came from in words.

    Raises:
        ConfigError: no folder, no answer from the hub, and not in the table.
    """
    config, source = find_config(name)
    return _shape(config, name), source


@lru_cache
def find_config(name: str) -> tuple[dict[str, Any], str]:
    """What ``config.json`` says, and where it came from in words. Raises as ``find_shape``."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text(encoding="utf-8")), f"{folder}/config.json"
    known = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    if folder.is_dir() or name.startswith((".", "/", "~")):
        raise ConfigError(f"model_name_or_path: {name} has no config.json; give a folder save_pretrained wrote")
    if "/" in name:  # only hub ids have one
        try:
            return _from_hub(name), "the hub's config.json"
        except OSError as error:  # what the hub's client raises for every way of not reaching it
            reason = type(error).__name__
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(
                    f"model_name_or_path: the hub does not give {name} ({reason}) and the table of public figures "
                    f"lacks it; give a folder with its config.json{hint}"
                ) from error
            return known[name], f"the table of public figures, as the hub was not reached ({reason})"
    if name in known:
        return known[name], "the table of public figures"
    raise ConfigError(f"model_name_or_path: there is no model {name}; known without the hub: {', '.join(known)}")


def table_shape(name: str) -> ModelShape:
    """Of a model in the table of public figures; asks nobody."""
    return _shape(json.loads(TABLE.read_text(encoding="utf-8"))["models"][name], name)


def _from_hub(name: str) -> dict[str, Any]:
    import huggingface_hub
    from huggingface_hub import constants

    path = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if not isinstance(path, str):
        # The client repeats a failed request for minutes; whether anybody is there at all is told at once.
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        socket.create_connection((host, 443), timeout=HUB_SECONDS).close()
        path = huggingface_hub.hf_hub_download(name, "config.json", etag_timeout=HUB_SECONDS)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _shape(config: dict[str, Any], name: str) -> ModelShape:
    config = _with_defaults(config)
    if mixed := [key for key in STATE_SPACE if key in config]:
        raise ConfigError(
            f"model_name_or_path: {name} has state-space layers ({mixed[0]}); only models with attention in every "
            "layer can be planned"
        )
    try:
        return model_shape(config, counted(config) if has_experts(config) else None)
    except KeyError as error:
        raise ConfigError(
            f"model_name_or_path: the config of {name} has no {error}; only decoder-only transformers can be planned"
        ) from error


def counted(config: dict[str, Any]) -> Counted | None:
    """Of the model that transformers builds from the config; None where it knows no such causal language model."""
    from igrpo.models.loading import count_parameters

    model = _built(config)
    return None if model is None else Counted(*count_parameters(model))


def _built(config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from igrpo.models.loading import blank

    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    return blank(CONFIG_MAPPING[config["model_type"]].from_dict(config))


def run_shape(config: TrainConfig) -> tuple[ModelShape, str]:
    """``find_shape`` of a run's model, with its adapters. Raises as it, and for layers that can have none."""
    shape, source = find_shape(config.model_name_or_path)
    model = _built(_with_defaults(find_config(config.model_name_or_path)[0])) if shape.experts else None
    return shape if model is None else with_adapters(shape, model, config), source


def loaded_shape(path: str, config: TrainConfig) -> ModelShape:
    """Of the model that a run is about to load. Raises KeyError for a config that lacks a size."""
    from igrpo.models.loading import count_parameters, model_config, model_sizes, skeleton

    sizes = model_sizes(model_config(path, config))
    if not has_experts(sizes):
        return model_shape(sizes)
    model = skeleton(path, config)
    return with_adapters(model_shape(sizes, Counted(*count_parameters(model))), model, config)


def with_adapters(shape: ModelShape, model: Any, config: TrainConfig) -> ModelShape:
    """What peft adapts of experts depends on how a model keeps them, so it is asked.

    Args:
        model: without its weights; it gets the adapters.

    Raises:
        ConfigError: a layer that can have none.
    """
    if not config.use_peft:
        return shape
    from igrpo.learner.adapters import Adapters

    layers = Adapters(model, config).layers.values()
    return replace(
        shape,
        adapter_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapted_experts=sum(layer.get_param().numel() for layer in layers if hasattr(layer, "parameter_name")),
    )


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A config with other names, or one inside another, as transformers reads it: Gemma 3's files leave most out."""
    if "hidden_size" in config and "text_config" not in config:
        return config  # without transformers, which takes seconds to import
    from transformers import CONFIG_MAPPING

    from igrpo.models.loading import model_sizes

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    return model_sizes(CONFIG_MAPPING[config["model_type"]].from_dict(config))


def known_rows(dataset_name: str) -> int | None:
    """Training rows of a public data set the recipes name."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["rows"].get(dataset_name)
