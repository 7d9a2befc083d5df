"""The keys that published TRL and open-r1 GRPO recipes are written with, each set as one file has it; keys only.

Every key is known here, lives on under another name, or is dropped with one line that says why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from igrpo.config.recipe import DROPPED, RENAMED, build_config
from igrpo.config.train_config import TrainConfig
from igrpo.settings.section import field_types

MODEL = "model_name_or_path model_revision torch_dtype attn_implementation dataset_name"
OPEN_R1 = f"""{MODEL} bf16 use_vllm do_eval gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs hub_model_id hub_strategy learning_rate log_completions log_level logging_first_step
logging_steps logging_strategy lr_scheduler_type max_prompt_length max_completion_length max_steps num_generations
num_train_epochs output_dir overwrite_output_dir per_device_train_batch_size push_to_hub report_to save_strategy seed
warmup_ratio"""

RECIPES = {
    "open-r1 DeepSeek-R1-Distill-Qwen-1.5B demo": f"""{OPEN_R1} chat_template dataset_configs vllm_device
        vllm_gpu_memory_utilization eval_strategy eval_steps lr_scheduler_kwargs per_device_eval_batch_size
        save_total_limit""",
    "open-r1 Qwen2.5-Coder-7B-Instruct codeforces": f"""{OPEN_R1} dataset_prompt_column system_prompt callbacks
        benchmarks beta loss_type scale_rewards eval_strategy vllm_device vllm_gpu_memory_utilization
        hub_model_revision max_grad_norm reward_funcs reward_weights save_steps save_total_limit temperature
        wandb_entity wandb_project mask_truncated_completions code_language code_eval_test_batch_size""",
    "open-r1 Qwen2.5-Math-7B simple RL": f"""{OPEN_R1} dataset_config system_prompt wandb_project reward_weights
        reward_funcs vllm_device vllm_gpu_memory_utilization eval_strategy eval_steps per_device_eval_batch_size""",
    "open-r1 OpenR1-Zero-7B-Math v08": f"""{OPEN_R1} chat_template dataset_config callbacks benchmarks beta
        eval_strategy generation_batch_size hub_model_revision mask_truncated_completions max_grad_norm num_iterations
        reward_funcs reward_weights save_steps save_total_limit sync_ref_model temperature epsilon""",
    "open-r1 R1-Distill-Qwen-Math-7B-Merges v00": f"""{OPEN_R1} dataset_config callbacks benchmarks beta eval_strategy
        generation_batch_size hub_model_revision mask_truncated_completions max_grad_norm num_iterations reward_funcs
        reward_weights save_steps save_total_limit sync_ref_model temperature epsilon""",
    "open-r1 Qwen2.5-1.5B-Instruct code": f"""{OPEN_R1} dataset_configs system_prompt beta vllm_device
        vllm_gpu_memory_utilization lr_scheduler_kwargs reward_funcs reward_weights save_steps save_total_limit
        temperature""",
    "open-r1, every argument of its script": f"""{OPEN_R1} dataset_config dataset_train_split dataset_prompt_column
        reward_funcs cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct cosine_max_value_correct
        cosine_max_len repetition_n_grams repetition_max_penalty code_language code_eval_test_batch_size
        parallel_code_exec_per_proc code_provider code_eval_scoring_mode ioi_provider e2b_router_url morph_router_url
        max_completion_len soft_punish_cache chat_template system_prompt benchmarks callbacks hub_model_revision
        num_completions_to_print overwrite_hub_revision push_to_hub_revision wandb_entity wandb_project wandb_run_group
        wandb_log_unique_prompts""",
    "the iGRPO paper's table": """bf16 attn_implementation use_vllm vllm_gpu_memory_utilization
        gradient_accumulation_steps gradient_checkpointing learning_rate lr_scheduler_type lr_scheduler_kwargs
        warmup_ratio num_train_epochs per_device_train_batch_size max_completion_length num_generations temperature
        reward_funcs reward_weights model_name_or_path dataset_name""",
    "TRL 1.16 script, every key of the algorithm": """model_name_or_path dataset_name dtype learning_rate
        per_device_train_batch_size gradient_accumulation_steps steps_per_generation num_generations
        num_generations_eval max_completion_length shuffle_dataset temperature top_p top_k min_p use_vllm vllm_mode
        vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta
        num_iterations epsilon epsilon_high delta importance_sampling_level reward_weights scale_rewards loss_type
        mask_truncated_completions top_entropy_quantile entropy_coef off_policy_mask_threshold use_bias_correction_kl
        sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
        vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
        vllm_importance_sampling_clip_min log_completions num_completions_to_print disable_dropout sync_ref_model
        chat_template_kwargs optim logging_steps save_steps report_to output_dir""",
}


def plausible(key: str, defaults: TrainConfig) -> Any:
    """The default of the key as it is called here: this is about names, not about values."""
    if key in DROPPED:
        return "anything"
    name = RENAMED.get(key, key)
    return {"eval_steps": 100, "dataset_configs": ["all"]}.get(key, getattr(defaults, name))


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipes_load_with_one_warning_per_dropped_key(recipe, capsys):
    keys = RECIPES[recipe].split()
    assert len(keys) == len(set(keys))
    defaults = TrainConfig(model_name_or_path="m", dataset_name="d", reward_weights=[1.0, 1.0])
    config = build_config({key: plausible(key, defaults) for key in keys})
    assert dataclasses.asdict(config).keys() == field_types(TrainConfig).keys()
    warned = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    expected = {key for key in keys if key in DROPPED or key in RENAMED}
    if "eval_steps" in keys:
        expected.add("eval_steps")  # TRL evaluates the whole evaluation set; here eval_samples says how much
    assert sorted(warned) == sorted(expected)


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [
        (0.1, 20, range(2, 21, 2)),
        (0.3, 10, (3, 6, 9)),
        (0.05, 4, range(1, 5)),
        (4, 10, (4, 8)),
        (0, 5, ()),
        (None, 5, ()),
    ],
)
def test_a_share_of_all_steps_is_as_good_as_a_number(every, total, steps):
    """open-r1 writes `save_steps: 0.1`: a tenth of the run, rounded up to whole steps."""
    from types import SimpleNamespace

    from igrpo.training_run import TrainingRun

    due = [
        step for step in range(1, total + 1) if TrainingRun.due(SimpleNamespace(step=step, total_steps=total), every)
    ]
    assert due == list(steps)


def test_a_list_of_one_data_set_configuration_is_that_configuration(capsys):
    config = build_config({"model_name_or_path": "m", "dataset_name": "d", "dataset_configs": ["all"]})
    assert config.dataset_config == "all"


def test_a_recipes_own_chat_template_is_the_one_that_is_used(tmp_path):
    from igrpo.models.loading import load_tokenizer
    from tests.support.tiny import save_tiny

    folder = save_tiny(tmp_path)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    config = TrainConfig(model_name_or_path=folder, dataset_name="d", chat_template=template)
    tokenizer = load_tokenizer(folder, config)
    turns = [{"role": "user", "content": "2+2?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "[user] 2+2?\n"
