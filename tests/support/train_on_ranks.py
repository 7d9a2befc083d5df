"""Learner steps on this process's share of fixed samples, in several set-ups.

Run by ``torchrun`` from test_learner_ranks.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Kept, Routes, TrainingSample
from igrpo.learner.learner import Learner
from igrpo.learner.placements import Fsdp2, Whole, Zero3
from igrpo.models.loading import load_policy
from igrpo.models.saved_format import SavedFormat
from igrpo.settings import ConfigError
from tests.support.architectures import tiny_config, tiny_model
from tests.support.tiny import tiny_llama, tiny_tokenizer

EVERYWHERE: dict[str, Any] = {
    "use_peft": True, "lora_dropout": 0.0, "beta": 0.01, "num_iterations": 2, "tied": False,
    "lora_target_modules": ["all-linear", "lm_head", "embed_tokens"],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"loss_type": "dapo"},
    "bnpo": {"loss_type": "bnpo"},
    "token budget": {"token_budget": 40},
    "adapters, kl": {"use_peft": True, "lora_dropout": 0.0, "beta": 0.01, "num_iterations": 2},
    "sharded": {"fsdp": True},
    "sharded, untied, checkpointing": {
        "fsdp": True, "tied": False, "loss_type": "dapo", "gradient_checkpointing": True, "token_budget": 40,
    },
    "sharded, taught": {
        "fsdp": True, "train_on_drafts": True, "distillation_weight": 1.0, "num_iterations": 2,
        "teacher_model_kind": "ema", "teacher_update_rate": 0.3,
    },
    "taught": {"train_on_drafts": True, "distillation_weight": 1.0, "teacher_model_kind": "ema"},
    "sharded, taught by the first weights": {
        "fsdp": True, "train_on_drafts": True, "distillation_weight": 0.5, "num_iterations": 2,
        "teacher_model_kind": "base",
    },
    "sharded, adapters, taught": {
        "fsdp": True, "train_on_drafts": True, "distillation_weight": 1.0, "teacher_model_kind": "base",
        "use_peft": True, "lora_dropout": 0.0,
    },
    "sharded, kl": {"fsdp": True, "beta": 0.01, "num_iterations": 2},
    "sharded, adapters, kl": {"fsdp": True, **EVERYWHERE},
    "sharded, bf16": {"fsdp": True, "bf16": True},
    "experts": {"experts": True, "num_iterations": 2},
    "experts, replayed": {"experts": True, "router_replay": True, "num_iterations": 2},
    "kept": {"top_k": 20, "num_iterations": 2},
    "experts, sharded, checkpointing": {
        "experts": True, "fsdp": True, "gradient_checkpointing": True, "token_budget": 40,
    },
    "experts, sharded, adapters": {"experts": True, "fsdp": True, "use_peft": True, "lora_dropout": 0.0},
}  # fmt: skip

ZERO3: dict[str, dict[str, Any]] = {
    "zero3": {"zero3": True},
    "zero3, untied, checkpointing": {
        "zero3": True, "tied": False, "loss_type": "dapo", "gradient_checkpointing": True, "token_budget": 40,
    },
    "zero3, kl": {"zero3": True, "beta": 0.01, "num_iterations": 2},
    "zero3, adapters, kl": {"zero3": True, **EVERYWHERE},
    "zero3, bf16": {"zero3": True, "bf16": True},
}  # fmt: skip
"""DeepSpeed with several processes; one process works without it, so that the two are compared."""

READ_IN_PARTS: list[bool] = []
"""Of each model that came from files."""
COUNTED = "sharded, untied, checkpointing"
"""Here the gathers of a step are counted."""
RESUMED = ("sharded", "sharded, adapters, kl", "sharded, taught", "zero3", "zero3, adapters, kl")


def samples() -> list[TrainingSample]:
    """Three prompts with four ragged completions each; where the advantage is 0, a process would have less to do."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(12):
        if i % 4 == 0:
            prompt = torch.randint(5, 280, (3 + i,), generator=generator).tolist()
        completion = torch.randint(5, 280, (1 + (5 * i) % 11,), generator=generator).tolist()
        advantage = 0.0 if i % 2 and i > 3 else (-1.0) ** (i // 2) * (1.0 + i / 10)
        made.append(TrainingSample(tuple(prompt), tuple(completion), (-5.0,) * len(completion), advantage))
    return made


def with_more(sample: TrainingSample, config: TrainConfig) -> TrainingSample:
    """Experts of a token, and what its sampler kept, where the learner asks for them."""
    if config.router_replay:
        read = len(sample.prompt_ids) + len(sample.completion_ids) - 1
        own = torch.Generator().manual_seed(sum(sample.completion_ids))  # those of another sample would differ
        chosen = torch.rand(read, 2, 4, generator=own).topk(2).indices
        sample = replace(sample, routes=Routes(chosen.to(torch.int16).numpy().tobytes(), 2, 2))
    if config.top_k:
        sample = replace(sample, kept=Kept.of([[t, *({5, 9, t + 1} - {t})] for t in sample.completion_ids]))
    return sample


def build(
    *, fsdp: bool = False, zero3: bool = False, tied: bool = True, files: Path | None = None,
    read_in_parts: bool = False, experts: bool = False, **settings: Any,
) -> Learner:  # fmt: skip
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()
    os.environ["FSDP_VERSION"] = "2"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(zero3 and int(os.environ["WORLD_SIZE"]) > 1).lower()
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    options = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2,
        "max_completion_length": 16, "vllm_importance_sampling_correction": False, "adam_epsilon": 1e-5, **settings,
    }  # fmt: skip
    config = TrainConfig(model_name_or_path="m", dataset_name="d", **options)
    torch.manual_seed(1)  # the adapters' first values
    reference = tiny_llama(tied=tied) if config.has_reference else None
    if reference is not None:
        with torch.no_grad():
            reference.model.norm.weight.mul_(1.1)  # near enough that the KL term's gradient is of ordinary size
    if experts:
        model = tiny_model(tiny_config("qwen3_moe", vocab_size=288, initializer_range=0.2, router_aux_loss_coef=0.5))
    elif files is None:
        model = tiny_llama(tied=tied)
    else:
        with profile() as profiled:
            model = load_policy(str(files), config, divide=Fsdp2.divider(config) if read_in_parts else None)
            SavedFormat(model)
        # Of tensors on the CPU: NCCL has no collective for them.
        assert not [event.key for event in profiled.key_averages() if "c10d" in event.key]
        READ_IN_PARTS.append(all(isinstance(p, DTensor) for p in model.model.layers.parameters()))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learner = Learner(model, reference, config, pad_token_id=0)
    expected = Zero3 if zero3 else Fsdp2 if fsdp else Whole
    assert type(learner.placement) is (expected if learner.accelerator.num_processes > 1 else Whole)
    learner.set_schedule(10)
    return learner


def train(learner: Learner, advantage: float = 1.0) -> dict[str, float]:
    """One step; with ``advantage`` 0 nothing has a gradient and only Adam's momentum moves the weights."""
    accelerator = learner.accelerator
    everyone = [with_more(s, learner.config) for s in samples()]
    if learner.config.distillation_weight:  # of one prompt's completions, which are not spread evenly
        everyone[:4] = [replace(s, teacher_prompt_ids=(*s.prompt_ids, 7, 9)) for s in everyone[:4]]
    own = everyone[accelerator.process_index :: accelerator.num_processes]
    metrics = learner.train_on([replace(s, advantage=s.advantage * advantage) for s in own])
    names = ("loss", "grad_norm", "learner/sequences", "learner/groups_skipped", "aux_loss", "experts/busiest_share")
    return {name: value for name, value in learner.over_processes(metrics).items() if name in names}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_tensors()}


def goes_on_from_a_checkpoint(settings: dict[str, Any], folder: Path, whole: Learner, second: dict[str, float]) -> None:
    """One step, saved, loaded elsewhere, another step: as ``whole`` after its second one, bit for bit."""
    again = build(**settings)
    train(again)
    again.save(folder, tiny_tokenizer(), {"step": 1})
    resumed = build(**settings)
    assert resumed.load(folder) == {"step": 1}
    assert train(resumed) == second
    expected = weights(whole)
    for key, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[key]), key
    if isinstance(resumed.placement, Zero3):
        runs_no_code(build(**settings), folder)


def runs_no_code(learner: Learner, folder: Path) -> None:
    """DeepSpeed's own reader unpickles whatever its files hold."""
    (own,) = folder.rglob(f"zero_pp_rank_{learner.accelerator.process_index}_*_optim_states.pt")
    torch.save({"optimizer_state_dict": os.mkdir}, own)
    learner.accelerator.wait_for_everyone()
    try:
        learner.load(folder)
    except ConfigError as error:
        assert "holds objects whose loading may run code" in str(error)
    else:
        raise AssertionError("it was unpickled")


FILES: dict[str, tuple[dict[str, Any], bool]] = {
    "tied, bf16": ({}, True),
    "pickled": ({"use_peft": True, "lora_dropout": 0.0}, True),
    "tied, pickled twice": ({}, True),
    "without a head": ({}, False),
    "qwen3_moe": ({}, True),
    "olmo_hybrid": ({}, False),
}
"""A model's files, and whether each process reads a part of them: experts are put together from whole files, but not
rows of several weights in one, and what no file has is drawn as for a whole model."""


def write_models(folder: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(folder / "tied, bf16")
    for name in ("pickled", "tied, pickled twice", "without a head"):
        model = tiny_llama(tied="tied" in name)
        model.config.save_pretrained(folder / name)
        kept = {k: v for k, v in model.state_dict().items() if "pickled" in name or k != "lm_head.weight"}
        torch.save(kept, folder / name / "pytorch_model.bin")
    for name in ("qwen3_moe", "olmo_hybrid"):
        tiny_model(tiny_config(name)).save_pretrained(folder / name)


def reads_its_part(folder: Path) -> None:
    """And has the weights and takes the step that it would have with all of them."""
    state = PartialState()
    if state.is_main_process:
        write_models(folder)
    state.wait_for_everyone()
    for name, (settings, in_parts) in FILES.items():
        made = []
        for read_in_parts in (False, True):
            torch.manual_seed(2)
            learner = build(fsdp=True, files=folder / name, read_in_parts=read_in_parts, **settings)
            made.append(weights(learner))
            if "llama" in learner.unwrapped.config.model_type:
                made[-1] |= {"loss": torch.tensor(train(learner)["loss"])}
                made[-1] |= {f"{key}, trained": tensor for key, tensor in weights(learner).items()}
        assert READ_IN_PARTS[-2:] == [False, in_parts], name
        assert made[0].keys() == made[1].keys() and all(torch.equal(made[1][k], v) for k, v in made[0].items()), name


def refuses_an_optimiser_of_whole_weights() -> None:
    drawn = torch.get_rng_state()
    try:
        build(fsdp=True, optim="adafactor")
    except ConfigError as error:
        assert str(error).startswith("optim: adafactor cannot step on weights that FSDP divides")
        assert "write adamw_torch_fused" in str(error)
    else:
        assert torch.distributed.get_world_size() == 1  # nothing is divided
    for name in ("sgd", "adamw_torch"):
        build(fsdp=True, optim=name)
    torch.set_rng_state(drawn)


def main_zero3(output: str) -> None:
    results: dict[str, Any] = {}
    for name, settings in ZERO3.items():
        learner = build(**settings)
        figures = [train(learner), train(learner)]
        if isinstance(learner.placement, Zero3) and name in RESUMED:
            goes_on_from_a_checkpoint(settings, Path(output).parent / name, learner, figures[1])
        learner.score((5, 6, 7, 8))
        train(learner, advantage=0.0)
        results[name] = {"figures": figures, "weights": weights(learner), "score": learner.score((5, 6, 7, 8))}
    if learner.accelerator.is_main_process:
        torch.save({"processes": learner.accelerator.num_processes, "results": results}, output)


def main(output: str) -> None:
    results: dict[str, Any] = {}
    for name, settings in CASES.items():
        learner = build(**settings)
        figures = [train(learner)]
        if name == COUNTED:  # alone: a profile takes longer than a step
            with profile() as profiled:
                figures.append(train(learner))
            gathers = {event.key: event.count for event in profiled.key_averages()}.get("c10d::_allgather_base_", 0)
        else:
            figures.append(train(learner))
        if name in RESUMED:
            goes_on_from_a_checkpoint(settings, Path(output).parent / name, learner, figures[1])
        learner.score((5, 6, 7, 8))  # gathers weights; the next step has no backward pass that would drop them
        train(learner, advantage=0.0)
        scores = learner.score((5, 6, 7, 8))
        results[name] = {"figures": figures, "weights": weights(learner), "score": scores}
    if learner.accelerator.num_processes > 1:
        reads_its_part(Path(output).parent)
    refuses_an_optimiser_of_whole_weights()
    if learner.accelerator.is_main_process:
        torch.save({"processes": learner.accelerator.num_processes, "results": results, "gathers": gathers}, output)


if __name__ == "__main__":
    (main_zero3 if sys.argv[2:] == ["ZERO3"] else main)(sys.argv[1])
