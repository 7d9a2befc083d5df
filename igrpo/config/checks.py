"""What a setting may be: types, and combinations that cannot work; ranges are in `ranges.py`.

Each check raises ``ConfigError`` with one line that names the key and says what to write instead.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from igrpo.settings import ConfigError, shown

if TYPE_CHECKING:
    from igrpo.config.train_config import TrainConfig


_HOLDS_KEY = re.compile(r"@|[?&][^=&]*(key|token|secret|passw|sig)[^=&]*=", re.IGNORECASE)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has the type a key asks for; an int is a fine float, a bool and NaN are never a number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(matches(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if args:  # X | None
        return any(matches(value, a) for a in args)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def describe_type(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (list, dict):
        return {"list": "a list", "dict": "a mapping"}[origin.__name__]
    if args:
        return " or ".join(describe_type(a) for a in args)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


def check_addresses(config: TrainConfig) -> None:
    """What a setting holds is written into ``config.yaml``, to trackers and into messages: no key may be among it."""
    for key in ("vllm_server_base_url", "vllm_server_urls", "judge_base_url"):
        value = getattr(config, key)
        addresses = value if isinstance(value, list) else [value]
        if any(isinstance(address, str) and _HOLDS_KEY.search(address) for address in addresses):
            raise ConfigError(
                f"{key}: an address must hold no user, password or key, since settings are written into logs (it is "
                "not shown here); export IGRPO_SERVER_SECRET, or what judge_api_key_env names"
            )
    if isinstance(config.judge_api_key_env, str) and not re.fullmatch(
        "[A-Za-z_][A-Za-z0-9_]*", config.judge_api_key_env
    ):
        raise ConfigError(
            "judge_api_key_env: this is no name of an environment variable (it is not shown here); write the name, and "
            "export the key under it"
        )


def check_types(config: TrainConfig, hints: dict[str, Any]) -> None:
    for key, hint in hints.items():
        value = getattr(config, key)
        if not matches(value, hint):
            raise ConfigError(f"{key}: {shown(value)} does not fit; write {describe_type(hint)}")


_RENDER_ARGUMENTS = {
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}  # fmt: skip
"""Arguments of a tokenizer's `apply_chat_template` that no template gets to see."""


TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",), "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",), "aim": ("aim",), "clearml": ("clearml",), "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}  # fmt: skip
"""Names for ``report_to`` (accelerate's), each with the packages of which one must be installed."""


def check_trackers(names: list[str]) -> None:
    """Whether the trackers of ``report_to`` are installed on this machine; accelerate would leave them out in silence.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise ConfigError(
                f"report_to: {name} is not installed; pip install {TRACKERS[name][0]}, or write none "
                "(metrics.jsonl is always written)"
            )


def check_combinations(config: TrainConfig) -> None:
    for name in config.trackers:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to: there is no tracker {shown(name)}; write none, or some of {', '.join(TRACKERS)}"
            )
    if config.num_generations < 2:
        raise ConfigError("num_generations: a group of 1 has no group-relative advantage; write 2 or more")
    if config.completions_per_step % config.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size x gradient_accumulation_steps = {config.completions_per_step} completions do "
            f"not divide into groups of num_generations = {config.num_generations}; make one a multiple of the other"
        )
    if config.draft_template.count("{draft}") != 1:
        raise ConfigError("draft_template: write {draft} exactly once, where the draft goes")
    if taken := sorted(_RENDER_ARGUMENTS & config.chat_template_kwargs.keys()):
        raise ConfigError(f"chat_template_kwargs: {taken[0]} is set by the program itself; leave it out")
    for example in config.few_shot_examples:
        if set(example) != {"prompt", "completion"} or not all(isinstance(text, str) for text in example.values()):
            raise ConfigError(
                f"few_shot_examples: {shown(example)} does not fit; write {{prompt: text, completion: text}}"
            )
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        raise ConfigError(
            f"reward_weights has {len(config.reward_weights)} numbers and reward_funcs {len(config.reward_funcs)} "
            "names; write one weight per function"
        )
    if not config.reward_funcs:
        raise ConfigError("reward_funcs: without a reward there is nothing to learn; write for example [accuracy]")
    if config.draft_selection_score == "accuracy_first" and "accuracy" not in config.reward_funcs:
        raise ConfigError("draft_selection_score: accuracy_first needs `accuracy` in reward_funcs")
    if config.activation_offloading and not config.gradient_checkpointing:
        raise ConfigError(
            "activation_offloading needs gradient_checkpointing: true; without it the weights would travel too"
        )
    if config.eval_steps is not None and config.eval_samples == 0:
        raise ConfigError("eval_steps is set but eval_samples is 0; set eval_samples to the number of prompts to use")
    _check_drafts(config)
    _check_rewards(config)


def _check_drafts(config: TrainConfig) -> None:
    from igrpo.rewards.functions import highest_reward

    if config.draft_policy_lag and config.rollout_schedule == "barrier":
        raise ConfigError("rollout_schedule: barrier separates the stages that draft_policy_lag: 1 overlaps; drop one")
    if config.draft_policy_lag and config.full_determinism and config.use_peft and config.lora_dropout > 0:
        raise ConfigError(
            "full_determinism: with draft_policy_lag: 1 sampler and dropout draw from one generator at once; write "
            "lora_dropout: 0"
        )
    if config.early_stop_drafts and config.draft_selection != "best":
        raise ConfigError(f"early_stop_drafts keeps the best draft; draft_selection: {config.draft_selection} does not")
    if config.early_stop_drafts and highest_reward(config) is None:
        raise ConfigError(
            "early_stop_drafts: reward_funcs has functions of your own; write the highest reward there is as "
            "early_stop_reward"
        )
    if not config.train_on_drafts:
        return
    if config.algorithm != "igrpo" or config.num_drafts < 2:
        raise ConfigError("train_on_drafts needs a group of drafts: algorithm: igrpo and num_drafts: 2 or more")
    if config.early_stop_drafts:
        raise ConfigError("train_on_drafts: aborted drafts leave a biased group; switch early_stop_drafts off")
    if config.draft_policy_lag:
        raise ConfigError("train_on_drafts: what is trained on must come from the newest weights; draft_policy_lag: 0")


def _check_rewards(config: TrainConfig) -> None:
    for name in config.reward_env:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError("reward_env: write names of environment variables; values stay out of a recipe")
        if name == "IGRPO_SERVER_SECRET":
            raise ConfigError(f"reward_env: {name} is for servers and trainer alone; leave it out")
    if "judge" in config.reward_funcs and not (config.judge_model and config.judge_base_url):
        raise ConfigError("reward_funcs: judge needs judge_model and judge_base_url")
    if config.repetition_max_penalty > 0:
        raise ConfigError(
            f"repetition_max_penalty: {config.repetition_max_penalty} rewards repetition; write 0 or less"
        )
    cache = config.soft_punish_cache
    if "soft_overlong_punishment" in config.reward_funcs and not (cache and 0 < cache <= config.max_completion_length):
        raise ConfigError(
            "reward_funcs: soft_overlong_punishment needs soft_punish_cache, from 1 to max_completion_length "
            f"({config.max_completion_length}); DAPO's is a fifth of it"
        )
