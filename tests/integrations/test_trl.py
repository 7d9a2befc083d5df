"""`FusedGRPOTrainer` against TRL's own trainer: ten training steps, same completions, every loss type TRL has."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import save_tiny

trl = pytest.importorskip("trl")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402

from igrpo_kernels.integrations.trl import SUPPORTED_VERSIONS, FusedGRPOTrainer, check_version  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'", "ignore:TRL currently supports vLLM")

STEPS, PROMPTS, GROUP, MAX_LENGTH, END, VOCAB = 10, 2, 4, 8, 1, 288
TWO_ITERATIONS = {"num_iterations": 2}
TWO_MICRO_BATCHES = {"per_device_train_batch_size": PROMPTS * GROUP // 2, "gradient_accumulation_steps": 2}

# Every loss type, and between them every setting that changes the loss.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.04, **TWO_ITERATIONS},
    "bnpo": {"entropy_coef": 0.05, "mask_truncated_completions": True, **TWO_MICRO_BATCHES},
    "dr_grpo": {"use_bias_correction_kl": False, "beta": 0.04, **TWO_MICRO_BATCHES, **TWO_ITERATIONS},
    "dapo": {"epsilon_high": 0.28, "delta": 1.3, "entropy_coef": 0.05, **TWO_MICRO_BATCHES, **TWO_ITERATIONS},
    "cispo": {"epsilon_high": 1.1, "mask_truncated_completions": True, **TWO_MICRO_BATCHES, **TWO_ITERATIONS},
    "sapo": {"temperature": 1.3, **TWO_ITERATIONS},
    "luspo": {"importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3, **TWO_ITERATIONS},
    "vespo": {"beta": 0.04, **TWO_MICRO_BATCHES, **TWO_ITERATIONS},
    "grpo, sampler": {"vllm_importance_sampling_correction": True, "off_policy_mask_threshold": 0.01, **TWO_ITERATIONS},
    "grpo, sampler without bound": {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": None,
    },
    "dapo, sampler": {
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.2, **TWO_MICRO_BATCHES,
    },
    "grpo, top entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.02, **TWO_ITERATIONS},
    "dapo, adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 5.0, **TWO_MICRO_BATCHES},
}  # fmt: skip
TIMES = {"step_time", "epoch", "num_tokens"}


@pytest.fixture(scope="module", autouse=True)
def process_state() -> Iterator[None]:
    """The trainer reseeds everything, sets variables and collects garbage; the rest of the suite must not notice."""
    environment, python_state, torch_state = dict(os.environ), random.getstate(), torch.get_rng_state()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    random.setstate(python_state)
    torch.set_rng_state(torch_state)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


class Recorder(TrainerCallback):
    """The gradient of every step, before clipping's effect on AdamW can hide a factor."""

    def __init__(self) -> None:
        self.grads: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.grads.append(torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())]))


def made_up_rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    """Completions that depend on prompt, step and place in the group only: ragged, some cut, with noisy log-probs."""
    out: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for i, prompt in enumerate(prompts):
        rng = random.Random(f"{prompt}/{trainer.state.global_step}/{i % GROUP}")
        ids = [rng.randrange(5, VOCAB) for _ in range(rng.choice([1, 3, 5, MAX_LENGTH]))]
        if len(ids) < MAX_LENGTH:
            ids[-1] = END
        prompt_ids = trainer.processing_class(text=prompt)["input_ids"]
        exact = exact_logps(trainer, prompt_ids, ids)
        out["prompt_ids"].append(prompt_ids)
        out["completion_ids"].append(ids)
        out["logprobs"].append([x + rng.gauss(0.0, 0.3) for x in exact])
    return out


@torch.no_grad()
def exact_logps(trainer: Any, prompt_ids: list[int], ids: list[int]) -> list[float]:
    logits = trainer.model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / trainer.temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


def made_up_reward(completion_ids: list[list[int]], solution: list[int], **_: Any) -> list[float]:
    return [float(sum(ids) % solution[i] == 0) + 0.1 * (len(ids) % 3) for i, ids in enumerate(completion_ids)]


def settings(folder: str, **overrides: Any) -> trl.GRPOConfig:
    keys = {
        "max_steps": STEPS, "per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP,
        "max_completion_length": MAX_LENGTH, "learning_rate": 1e-3, "adam_epsilon": 1e-5, "temperature": 0.7,
        "vllm_importance_sampling_correction": False, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch",
        "output_dir": f"{folder}-out", **overrides,
    }  # fmt: skip
    return trl.GRPOConfig(**keys)


def trained(cls: type, folder: str, **overrides: Any) -> tuple[list[dict], list[torch.Tensor], int]:
    """Logs and gradients of every step, and how often the lm_head was called while training."""
    from datasets import Dataset

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    args = settings(folder, **overrides)
    data = Dataset.from_dict({"prompt": [f"question {i}" for i in range(8)], "solution": [2, 3, 4, 5] * 2})
    trainer = cls(folder, made_up_reward, args, data, rollout_func=made_up_rollout)
    trainer.remove_callback(PrinterCallback)
    recorder = Recorder()
    trainer.add_callback(recorder)
    if args.vllm_importance_sampling_correction:
        # TRL corrects only what vLLM sampled; switched on here because the constructor would start an engine.
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = NoEngine()
    heads: list[int] = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out.requires_grad))
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log], recorder.grads, sum(heads)


class NoEngine:
    mode = "server"

    def sync_weights(self) -> None:
        pass


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_trl(folder, case):
    overrides = {"loss_type": case.partition(",")[0], **CASES[case]}
    logs, grads, _ = trained(trl.GRPOTrainer, folder, **overrides)
    fused_logs, fused_grads, logits_made = trained(FusedGRPOTrainer, folder, **overrides)
    assert logits_made == 0
    assert len(logs) == len(fused_logs) == len(grads) == len(fused_grads) == STEPS
    for log, fused in zip(logs, fused_logs, strict=True):
        assert log.keys() == fused.keys()
        for name in log.keys() - TIMES:
            assert fused[name] == pytest.approx(log[name], rel=2e-4, abs=2e-5), name
    for grad, fused in zip(grads, fused_grads, strict=True):
        assert float((fused - grad).norm()) <= 1e-4 * float(grad.norm())
    assert max(float(grad.norm()) for grad in grads) > 1e-2
    for name, value in INTERESTING.get(case, {}).items():
        assert max(log.get(name, 0.0) for log in logs) > value, name


# What a case must have met for its comparison to mean something.
INTERESTING = {
    "grpo": {"kl": 1e-3, "clip_ratio/region_mean": 0.0},
    "dapo": {"clip_ratio/low_mean": 0.0, "policy_loss": 0.0},
    "cispo": {"cispo_clip_ratio": 0.0},
    "luspo": {"clip_ratio/high_max": 0.0},
    "grpo, sampler": {"sampling/importance_sampling_ratio/max": 1.5},
}


def test_an_unknown_release_is_refused_with_a_sentence():
    for release in SUPPORTED_VERSIONS:
        check_version(f"{release}.3")
    with pytest.raises(ImportError, match=r"works with TRL 1\.14 to 1\.16, found 0\.18\.0: install one of these"):
        check_version("0.18.0")
    with pytest.raises(ImportError, match=r"found 2\.0\.0\.dev0"):
        check_version("2.0.0.dev0")


def test_settings_whose_model_call_cannot_be_entered_are_refused(folder):
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="does not work with torch_compile"):
        FusedGRPOTrainer(folder, made_up_reward, settings(folder, torch_compile=True), one_row())


def test_an_adapter_trains_and_its_base_is_the_reference(folder):
    """PEFT: hidden states come from under the adapter, reference log-probs from the same model without it."""
    peft = pytest.importorskip("peft")
    AcceleratorState._reset_state(True)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    runs = []
    for cls in (trl.GRPOTrainer, FusedGRPOTrainer):
        AcceleratorState._reset_state(True)
        trainer = cls(
            folder, made_up_reward, settings(folder, beta=0.5, max_steps=3, loss_type="grpo"), one_row(),
            rollout_func=made_up_rollout, peft_config=adapter,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        generator = torch.Generator().manual_seed(0)
        for name, p in sorted(trainer.model.named_parameters()):  # not every release seeds the adapter
            if "lora_A" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
        trainer.train()
        runs.append([log for log in trainer.state.log_history if "loss" in log])
    for log, fused in zip(*runs, strict=True):
        for name in log.keys() - TIMES:
            assert fused[name] == pytest.approx(log[name], rel=2e-4, abs=2e-5), name
    assert runs[0][-1]["kl"] > 0


def one_row() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["question 0", "question 1"], "solution": [2, 3]})


def test_nothing_of_trl_is_patched():
    import ast

    for path in Path("igrpo_kernels/integrations/trl").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute):
                    assert ast.unparse(target.value) in ("self", "inner", "engine"), ast.unparse(target)
