"""Recipes and the command line: what loads, what is refused, and with which words."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml

from igrpo.config.recipe import (
    DROPPED,
    RENAMED,
    build_config,
    field_docs,
    help_text,
    parse_args,
)
from igrpo.config.train_config import TrainConfig
from igrpo.learner.optimizer import check_settings
from igrpo.settings import ConfigError
from igrpo.settings.kinds import Interval
from igrpo.settings.section import field_marks, field_types
from igrpo.settings.yaml_text import dump_yaml

BASE = {"model_name_or_path": "m", "dataset_name": "d.jsonl"}
ROOT = Path(__file__).resolve().parents[2]

# The hyper-parameter table of the paper's 7B run, as people have it in their recipes.
PAPER_TABLE = """
bf16: true
attn_implementation: flash_attention_2
use_vllm: true
vllm_gpu_memory_utilization: 0.85
gradient_accumulation_steps: 8
gradient_checkpointing: true
learning_rate: 1.0e-06
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_ratio: 0.1
num_train_epochs: 1
per_device_train_batch_size: 16
max_completion_length: 4096
num_generations: 4
temperature: 0.7
reward_funcs: [accuracy, format]
reward_weights: [1.0, 1.0]
"""


def parse(*words: str) -> TrainConfig:
    return parse_args(["--model_name_or_path", "m", "--dataset_name", "d.jsonl", *words])


def test_the_papers_table_loads_unchanged(capsys):
    config = build_config({**yaml.safe_load(PAPER_TABLE), **BASE})
    assert config.warmup_steps == 0.1 and config.learning_rate == 1e-6 and config.reward_weights == [1.0, 1.0]
    assert (config.prompts_per_step, config.num_drafts, config.loss_type, config.beta) == (32, 4, "grpo", 0.0)
    assert capsys.readouterr().err.splitlines() == ["warning: warmup_ratio is now called warmup_steps"]


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**BASE, "max_steps": 5, "beta": 0.1}))
    config = parse_args(["--config", str(recipe), "--max_steps=7", "--reward_funcs", "[format]", "--use_cpu"])
    assert (config.max_steps, config.beta, config.reward_funcs, config.use_cpu) == (7, 0.1, ["format"], True)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("--learning_rate", "1e-6"), "learning_rate", 1e-6),  # YAML reads 1e-6 as text
        (("--epsilon-high", "none"), "epsilon_high", None),
        (("--reward_weights", "[1, 0.5]"), "reward_weights", [1, 0.5]),
        (("--output_dir", "123"), "output_dir", "123"),  # a name stays text
        (("--dataset_kwargs", "{size: 5}"), "dataset_kwargs", {"size": 5}),
        (("--scale_rewards", "false"), "scale_rewards", "none"),
        (("--system_prompt", "null"), "system_prompt", None),
        (("--reward_funcs", "a", "--reward_weights", "2"), "reward_weights", [2]),
    ],
)
def test_values_on_the_command_line(words, key, value):
    assert getattr(parse(*words), key) == value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--learning_rat", "1"), ("learning_rat", "did you mean learning_rate?")),
        (("--beta", "much"), ("beta", "'much'", "a number")),
        (("--bf16", "maybe"), ("bf16", "true or false")),
        (("--num_drafts", "2.5"), ("num_drafts", "a whole number")),
        (("--reward_weights", "[1.0, a]"), ("reward_weights", "write a list of numbers or null")),
        (("--reward_funcs", "[accuracy, 3]"), ("reward_funcs", "write a list of texts")),
        (("--few_shot_examples", "[a]"), ("few_shot_examples", "write a list of mappings")),
        (("--loss_type", "ppo"), ("loss_type", "one of grpo, bnpo")),
        (("--num_generations", "3"), ("8 completions", "num_generations = 3", "a multiple")),
        (("--num_generations", "1"), ("num_generations", "2 or more")),
        (("--draft_template", "no place"), ("draft_template", "{draft}")),
        (("--reward_weights", "[1.0]"), ("reward_weights", "reward_funcs")),
        (("--draft_selection_score", "accuracy_first", "--reward_funcs", "format"), ("accuracy_first", "reward_funcs")),
        (("--few_shot_examples", "[{prompt: q}]"), ("few_shot_examples", "completion: text")),
        (("--eval_steps", "5"), ("eval_steps", "eval_samples")),
        (("--temperature", "0"), ("temperature", "above 0")),
        (("--max_steps", "0"), ("max_steps", "-1")),
        (("--save_steps", "2.5"), ("save_steps", "a share of all below 1")),
        (("--logging_steps", "0"), ("logging_steps", "a number of steps")),
        (("--token_budget", "0"), ("token_budget", "null")),
        (
            ("--activation_offloading", "--gradient_checkpointing", "false"),
            ("activation_off", "gradient_checkpointing"),
        ),
        (("--draft_policy_lag", "2"), ("draft_policy_lag", "0, 1")),
        (("--draft_policy_lag", "1", "--rollout_schedule", "barrier"), ("rollout_schedule", "drop one")),
        (("--draft_policy_lag", "1", "--vllm_enable_sleep_mode"), ("vllm_enable_sleep_mode", "draft_policy_lag: 0")),
        (
            ("--use_peft", "--lora_sync", "adapter", "--vllm_mode", "server", "--vllm_weight_transfer", "nccl"),
            ("vllm_weight_transfer: nccl", "write auto, or lora_sync: merged"),
        ),
        (("--policy_lag", "-1"), ("policy_lag", "0 or more")),
        (
            ("--policy_lag", "2", "--draft_policy_lag", "1"),
            ("draft_policy_lag", "policy_lag: 2", "draft_policy_lag: 0"),
        ),
        (("--policy_lag", "2", "--rollout_schedule", "barrier"), ("rollout_schedule", "policy_lag: 2")),
        (("--policy_lag", "2", "--vllm_enable_sleep_mode"), ("vllm_enable_sleep_mode", "policy_lag: 0")),
        (
            ("--policy_lag", "1", "--full_determinism", "--use_peft", "--lora_dropout", "0.1"),
            ("full_determinism", "policy_lag: 1", "lora_dropout: 0"),
        ),
        (("--policy_lag", "1", "--vllm_importance_sampling_correction", "false"), ("policy_lag", "correction: true")),
        (("--policy_lag", "1", "--refinement_context", "both"), ("policy_lag", "bare_importance_ratio: behaviour")),
        (("--use_peft", "--lora_sync", "adapter", "--lora_r", "513"), ("lora_sync", "up to rank 512")),
        (("--vllm_enable_sleep_mode", "auto"), ("vllm_enable_sleep_mode", "null")),
        (
            ("--draft_policy_lag", "1", "--full_determinism", "--use_peft", "--lora_dropout", "0.1"),
            ("full_determinism", "lora_dropout: 0"),
        ),
        (("--early_stop_drafts", "--draft_selection", "worst"), ("early_stop_drafts", "worst")),
        (("--early_stop_drafts", "--reward_funcs", "my.module:f"), ("early_stop_drafts", "early_stop_reward")),
        (("--train_on_drafts", "--draft_policy_lag", "1"), ("train_on_drafts", "draft_policy_lag: 0")),
        (("--train_on_drafts", "--early_stop_drafts"), ("train_on_drafts", "early_stop_drafts")),
        (("--refinement_context", "bare", "--algorithm", "grpo"), ("refinement_context: bare", "draft_selection")),
        (("--refinement_context", "both", "--draft_selection", "none"), ("refinement_context: both", "none")),
        (("--refinement_context", "question"), ("refinement_context", "draft, bare, both")),
        (
            (
                "--refinement_context",
                "bare",
                "--bare_importance_ratio",
                "behaviour",
                "--vllm_importance_sampling_correction",
                "false",
            ),
            ("bare_importance_ratio", "correction: true"),
        ),
        (
            ("--refinement_context", "bare", "--bypass_mode", "--vllm_importance_sampling_correction", "false"),
            ("bypass_mode", "bare_importance_ratio: behaviour"),
        ),
        (("--show_drafts", "3", "--num_drafts", "2"), ("show_drafts", "num_drafts = 2")),
        (("--refine_only", "dead", "--draft_selection", "none"), ("refine_only: dead", "draft_selection")),
        (("--refine_only", "dead", "--algorithm", "grpo"), ("refine_only: dead", "algorithm: igrpo")),
        (("--distillation_weight", "0.5"), ("distillation_weight", "behind the question alone", "train_on_drafts")),
        (("--distillation_weight", "0.5", "--algorithm", "grpo"), ("distillation_weight", "algorithm: igrpo")),
        (
            ("--distillation_weight", "0.5", "--refine_only", "dead", "--draft_selection", "none"),
            ("refine_only: dead", "draft_selection"),
        ),
        (
            ("--distillation_weight", "1", "--train_on_drafts", "--draft_selection", "none"),
            ("distillation_weight", "draft_selection other than none"),
        ),
        (
            ("--distillation_weight", "1", "--train_on_drafts", "--top_k", "20"),
            ("distillation_weight", "top_k: 20", "write top_k: 0"),
        ),
        (("--distillation_weight", "1.1"), ("distillation_weight", "1.0 or less")),
        (("--distillation_topk", "0"), ("distillation_topk",)),
        (("--refinement_baseline", "drafts"), ("refinement_baseline", "scale_rewards: none or batch")),
        (
            ("--refinement_baseline", "drafts", "--scale_rewards", "none", "--algorithm", "grpo"),
            ("refinement_baseline", "algorithm: igrpo"),
        ),
        (
            ("--refinement_baseline", "drafts", "--scale_rewards", "none", "--early_stop_drafts"),
            ("refinement_baseline", "early_stop_drafts"),
        ),
        (
            ("--refinement_baseline", "drafts", "--scale_rewards", "none", "--advantage_estimator", "rloo"),
            ("refinement_baseline", "advantage_estimator: grpo"),
        ),
        (("--refinement_copy_limit", "0"), ("refinement_copy_limit",)),
        (("--draft_advantage_estimator", "rloo"), ("draft_advantage_estimator", "train_on_drafts")),
        (("--advantage_estimator", "gae"), ("advantage_estimator", "grpo, rloo, maxrl, pass_at_k")),
        (
            ("--advantage_estimator", "pass_at_k", "--advantage_pass_k", "5"),
            ("advantage_pass_k", "num_generations = 4"),
        ),
        (
            (
                "--train_on_drafts",
                "--draft_advantage_estimator",
                "pass_at_k",
                "--advantage_pass_k",
                "3",
                "--num_drafts",
                "2",
            ),
            ("advantage_pass_k", "num_drafts = 2"),
        ),
        (("--advantage_estimator", "maxrl", "--reward_weights", "[1, -1]"), ("maxrl", "reward_weights")),
        (("--advantage_estimator", "maxrl", "--reward_error_value", "-1"), ("maxrl", "reward_error_value")),
        (("--advantage_estimator", "maxrl", "--reward_funcs", "cosine"), ("maxrl", "cosine gives rewards below 0")),
        (
            ("--advantage_estimator", "rloo", "--multi_objective_aggregation", "normalize_then_sum"),
            ("normalize_then_sum", "grpo"),
        ),
        (("--train_on_drafts", "--algorithm", "grpo"), ("train_on_drafts", "algorithm: igrpo")),
        (("--reward_funcs", "soft_overlong_punishment"), ("soft_punish_cache", "512")),
        (("--reward_funcs", "judge", "--judge_model", "m"), ("judge_base_url",)),
        (("--learning_rate", "nan"), ("learning_rate", "a number")),
        (("--reward_weights", "[1.0, .nan]"), ("reward_weights",)),
        (("--temperature", "inf"), ("temperature", "finite")),
        (("--seed", "-1"), ("seed", "0 or more")),
        (("--seed", str(2**32)), ("seed", "4294967295 or less")),
        (("--draft_policy_lag", "true"), ("draft_policy_lag", "one of 0, 1")),
        (("--warmup_ratio", "1.0"), ("warmup_ratio", "below 1")),
        (("--config", "no/such.yaml"), ("no/such.yaml", "no such file")),
        (("--config",), ("--config", "after it")),
        (("stray",), ("'stray'", "--key value")),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_change(words, parts):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(ConfigError, match="dataset_name is missing"):
        parse_args(["--model_name_or_path", "m"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: 1\nb: [1\n")
    with pytest.raises(ConfigError, match=r"line \d+ is not valid YAML"):
        parse_args(["--config", str(broken)])
    (tmp_path / "quickstart.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean quickstart\.yaml"):
        parse_args(["--config", str(tmp_path / "quickstar.yaml")])


@pytest.mark.parametrize("key", sorted(DROPPED))
def test_dropped_keys_warn_once_and_say_why(key, capsys):
    build_config({**BASE, key: "anything"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {key} is ignored: ")


def test_old_names_lead_to_keys_that_exist():
    assert set(RENAMED.values()) <= set(field_types(TrainConfig))
    assert not set(DROPPED) & set(field_types(TrainConfig)) and not set(RENAMED) & set(field_types(TrainConfig))


def test_a_config_survives_its_own_yaml():
    config = parse("--beta", "0.1", "--delta", "4.0", "--draft_selection", "worst")
    assert build_config(yaml.safe_load(dump_yaml(config))) == config


def test_every_key_is_explained():
    docs, text = field_docs(), help_text()
    assert set(docs) == set(field_types(TrainConfig))
    assert all(f"--{key}" in text and doc in text for key, doc in docs.items())


def test_every_recipe_in_the_project_loads():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        parse_args(["--config", str(recipe)])


def test_a_bad_key_ends_the_program_with_code_2_and_leaves_nothing(tmp_path):
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path / "run"), "--betta", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "igrpo.train", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: betta: there is no such key; did you mean beta?"
    assert list(tmp_path.iterdir()) == []


ODD = [
    "1", "0", "-1", "1.5", ".inf", "-.inf", ".nan", "1e400", "2024-13-45", "2024-01-01", "0x_", "!!int x", "!!float y",
    "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a]", "!!python/object:os.system x", "!<tag> x", "9" * 4400,
    "9" * 400, "[" * 300 + "]" * 300, "{" * 300, "&a [*a]", "&a {b: *a}", "*nope", "true", "null", "''", '"\\0"',
    '"\\ud800"', "'  '", "[]", "{}", "[1, a]", "{1: 2}", "[null]", "[.nan]", "1:30", "<<: 1", "~nosuchuser/x",
    "!!timestamp 2001-12-14t99:59:43", '"two\\nlines \\e[31m"', "{draft}{draft}", "0001-01-01", "best", "-" + "9" * 25,
]  # fmt: skip
"""Values as they stand in a recipe; 14,000 such recipes ended in fifteen kinds of traceback."""


def test_every_recipe_is_a_config_or_one_line(tmp_path):
    recipe, tried, refused = tmp_path / "r.yaml", 0, 0
    for i, key in enumerate(field_types(TrainConfig)):
        for value in ODD[i % 4 :: 4]:
            tried += 1
            text = "".join(f"{name}: {known}\n" for name, known in BASE.items() if name != key)
            recipe.write_text(f"{text}{key}: {value}\n", encoding="utf-8")
            try:
                config = parse_args(["--config", str(recipe)])
            except ConfigError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) <= 1500, (key, value)
            else:
                assert build_config(yaml.safe_load(dump_yaml(config))) == config, (key, value)
    assert tried > 1500 and 0.5 < refused / tried < 0.95


def test_the_same_on_the_command_line():
    for key in field_types(TrainConfig):
        for value in ODD[::9]:
            with contextlib.suppress(ConfigError):
                parse(f"--{key}={value}")


def test_every_number_has_an_interval():
    """A key that is new and has none would reach the run unchecked."""
    numeric = {
        key for key, hint in field_types(TrainConfig).items()
        if {int, float} & set(walk_types(hint)) and Literal not in map(get_origin, walk_types(hint))
    }  # fmt: skip
    ranged = {key for key, marks in field_marks(TrainConfig).items() if any(isinstance(m, Interval) for m in marks)}
    assert ranged == numeric


def walk_types(hint: object) -> list[object]:
    """A type, its alternatives and what it is a list of."""
    found = [hint]
    for part in get_args(hint) if get_origin(hint) is not Literal else ():
        found += walk_types(part)
    return found


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--adam_beta1", "5"), ("adam_beta1", "below 1")),
        (("--output_dir", ""), ("output_dir", "empty")),
        (("--num_train_epochs", "inf"), ("num_train_epochs", "finite")),
        (("--save_steps", "inf"), ("save_steps", "finite")),
        (("--save_steps", "9" * 400), ("save_steps", "smaller")),
        (("--output_dir", "~nosuchuser/x"), ("output_dir", "home")),
        (("--chat_template_kwargs", "{tokenize: true}"), ("chat_template_kwargs", "tokenize")),
        (("--dataset_kwargs", "{size: 2024-01-01}"), ("dataset_kwargs", "quotes")),
        (("--config", "x" * 5000), ("--config",)),
        (("--config", "a\0b"), ("--config",)),
        (("--config", "/"), ("--config", "no such file")),
        (("--" + "x" * 5000, "1"), ("no such key",)),
    ],
)
def test_settings_that_ended_in_a_traceback_or_were_taken(words, parts):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    for part in parts:
        assert part in str(caught.value)


def test_optimisers_and_schedules_are_tried_before_a_model_is_loaded():
    check_settings(parse("--lr_scheduler_type", "linear"))
    for words, part in (
        (("--optim", "adamm"), "optim: adamm"),
        (("--lr_scheduler_type", "cosin"), "cosin is not a valid"),
        (("--lr_scheduler_kwargs", "{min_lr_rate: a}"), "lr_scheduler_kwargs"),
        (("--lr_scheduler_kwargs", "{min_lr_rate: .nan}"), "a learning rate of 0"),
        (("--lr_scheduler_type", "reduce_lr_on_plateau"), "reduce_lr_on_plateau does not work"),
        (("--lr_scheduler_type", "inverse_sqrt", "--lr_scheduler_kwargs", "{timescale: 0}"), "division by zero"),
    ):
        with pytest.raises(ConfigError, match=part):
            check_settings(parse(*words))
