"""One optimiser step of this project's learner and of TRL's GRPOTrainer, on the same weights and completions.

TRL drives: its own `train()` runs, and asks for completions once per step through `rollout_func`. That is where ours
takes its turns, so both see the same state of the machine. TRL's time is that of its whole step less the time in which
it asks for completions, scores them and puts them into tensors; padding, loss, backward, clipping and AdamW remain,
which is what ours is timed for too.

The gate: everyone's first step starts from the same weights, and its gradient is compared with that of plain PyTorch in
fp32, sequence by sequence. Clipping is set so high that it computes the norm and scales nothing.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import peak_extra_bytes, significant

MODES = ("padded", "packed", "packed, shared prefix")
GATE = {True: 5e-2, False: 1e-3}
"""Largest |g - truth| / |truth| that passes as right, in bf16 and in fp32."""
LEAST_SPEED_UP = 1.5
"""Over TRL's step, by our packed step with shared prompts, at a lower peak."""


@dataclass(frozen=True)
class Case:
    """A random-weight Llama-shaped model, and groups whose prompts end in a draft, as in iGRPO's second stage."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    groups: int
    group_size: int
    question: int
    """Tokens of the bare prompt; the draft comes on top."""
    mean_length: int
    """Mean of drafts and completions; their lengths have a heavy tail."""
    longest: int
    bf16: bool = True
    checkpointing: bool = False
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        return self.groups * self.group_size


TOY = Case("toy", 64, 128, 2, 2, 1, 288, 2, 4, 8, 6, 12)
SMALL = Case("5M, V 8k", 256, 704, 4, 4, 2, 8_192, 4, 4, 64, 48, 160)
GPU_SMALL = Case("0.5B", 896, 4864, 24, 14, 2, 151_936, 4, 4, 512, 500, 2048)
PAPER_7B = Case("7B, the paper's settings", 3584, 18_944, 28, 28, 4, 152_064, 4, 4, 1024, 700, 4096, checkpointing=True)
"""16 completions of Table S.2's lengths: one device's micro-batch there."""


def lengths(case: Case) -> list[tuple[int, list[int]]]:
    """Per group: length of the draft, and of the completions. Log-normal, cut at the longest."""
    rng = random.Random(case.seed)

    def draw() -> int:
        return max(2, min(case.longest, round(rng.lognormvariate(0, 0.6) * case.mean_length / 1.2)))

    return [(draw(), [draw() for _ in range(case.group_size)]) for _ in range(case.groups)]


def make_groups(case: Case) -> list:
    """Rollout groups with mixed rewards; every advantage is non-zero, so that nothing may be skipped."""
    from igrpo.data_types import Completion, Problem, RolloutGroup, Scored
    from igrpo.rollout.advantage import group_advantages

    rng = random.Random(case.seed + 1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, case.vocab) for _ in range(n))

    rewards = [float(i % 2 == 0) for i in range(case.group_size)]
    (advantages,) = group_advantages([rewards], "none")
    groups = []
    for row, (draft, sizes) in enumerate(lengths(case)):
        completions = [Completion(ids(n), (-1.0,) * n, text="", finish_reason="stop", version=0) for n in sizes]
        scored = tuple(Scored(c, {"given": r}, r) for c, r in zip(completions, rewards, strict=True))
        problem = Problem(row, str(row), "")
        groups.append(RolloutGroup(problem, (), None, ids(case.question + draft), scored, advantages))
    return groups


def make_model(case: Case) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(case.seed)
    config = LlamaConfig(
        vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads,
        max_position_embeddings=16_384, tie_word_embeddings=case.layers < 28, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save_model(case: Case, folder: Path) -> str:
    """Both sides load it from here."""
    from tests.support.tiny import tiny_tokenizer

    make_model(case).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(case: Case) -> dict[str, Any]:
    """Under the names that both sides know."""
    return {
        "use_cpu": not torch.cuda.is_available(), "bf16": case.bf16, "gradient_checkpointing": case.checkpointing,
        "num_generations": case.group_size, "max_completion_length": case.longest, "temperature": 0.7,
        "per_device_train_batch_size": case.sequences, "gradient_accumulation_steps": 1, "learning_rate": 1e-6,
        "scale_rewards": "none", "loss_type": "grpo", "vllm_importance_sampling_correction": False, "seed": 3,
        "max_grad_norm": 1e9,
        **case.overrides,
    }  # fmt: skip


def our_learner(case: Case, folder: str | None, mode: str) -> tuple[Any, list]:
    """A learner in one of the modes, and the samples of its step; without a folder the model is made on the device."""
    from igrpo.config.train_config import TrainConfig
    from igrpo.learner import batching
    from igrpo.learner.learner import Learner
    from igrpo.models.loading import load_policy

    config = TrainConfig(
        model_name_or_path=folder or "random", dataset_name="unused", algorithm="grpo",
        shared_prefix=mode == "packed, shared prefix", **settings(case),
    )  # fmt: skip
    if folder is None:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = make_model(case)
        model.config.use_cache = False
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model = load_policy(folder, config)
    learner = Learner(model, None, config, pad_token_id=0)
    learner.set_schedule(1000)
    if mode == "padded":  # what the learner falls back to where a model's attention cannot be packed
        learner.packs = False
        learner.unwrapped.set_attn_implementation("sdpa")
    return learner, batching.training_samples(make_groups(case), config)


@dataclass
class Turns:
    """Times of each provider's steps, in milliseconds, and what one of them allocated at most."""

    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Of the first step's gradient: |g - truth| / |truth| over all weights."""

    def take(self, name: str, work: Callable[[], dict[str, float]], step: int) -> None:
        """Step 0 warms up, step 1 is measured for memory, the rest for time."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if step == 1:
            self.peak_bytes[name] = peak_extra_bytes(work, device)
            return
        synchronize()
        start = time.perf_counter()
        figures = work()
        synchronize()
        if step > 1:
            self.samples_ms.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        self.tokens[name] = figures["learner/unique_tokens"]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(case: Case, folder: Path, steps: int) -> Turns:
    """`steps` timed steps of everyone, after one to warm up and one for memory."""
    path, turns = save_model(case, folder), Turns()
    error_of = gradient_gate(case, path)
    with quiet():
        learners = {f"igrpo, {mode}": our_learner(case, path, mode) for mode in MODES}

        def ours(step: int) -> None:
            for name, (learner, samples) in learners.items():
                learner.placement.drop_gradients()  # TRL's gradients are gone between steps, too
                turns.take(name, lambda learner=learner, samples=samples: learner.train_on(samples), step)
                if step == 0:
                    turns.errors[name] = error_of(learner.unwrapped)

        if importlib.util.find_spec("trl") is not None:
            trl_steps(case, path, trl_settings(case, path, steps + 2), ours, turns, error_of)
        else:
            for step in range(steps + 2):
                ours(step)
    return turns


def gradient_gate(case: Case, folder: str) -> Callable[[Any], float]:
    """How far a model's gradients are from the truth of the first step; plain PyTorch in fp32 computes that here.

    With old log-probabilities equal to the new ones, -A · ratio has the gradient of -A · log-prob; a mean over each
    sequence's tokens, then over the sequences.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    temperature = settings(case)["temperature"]
    for group in make_groups(case):
        for scored, advantage in zip(group.refinements, group.advantages, strict=True):
            completion = torch.tensor(scored.completion.token_ids, device=model.device)
            ids = torch.cat([torch.tensor(group.prompt_ids, device=model.device), completion])[None]
            logits = model(ids[:, :-1], logits_to_keep=len(completion)).logits[0] / temperature
            logps = logits.log_softmax(-1).gather(-1, completion[:, None])
            (-advantage * logps.mean() / case.sequences).backward()
    truth = {name: p.grad.cpu() for name, p in model.named_parameters()}
    size = torch.stack([g.norm() for g in truth.values()]).norm()

    def error_of(other: Any) -> float:
        gaps = [(p.grad.float().cpu() - truth[name]).norm() for name, p in other.named_parameters()]
        return float(torch.stack(gaps).norm() / size)

    return error_of


def run_alone(case: Case, mode: str, steps: int) -> Turns:
    """One mode, for a model of which the device holds only one."""
    turns = Turns()
    gc.collect()  # the model of the mode before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with quiet():
        learner, samples = our_learner(case, None, mode)
        for step in range(steps + 2):
            learner.placement.drop_gradients()
            turns.take(f"igrpo, {mode}", lambda: learner.train_on(samples), step)
    return turns


def trl_settings(case: Case, folder: str, steps: int) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=f"{folder}-trl", max_steps=steps, logging_steps=1000, save_strategy="no", report_to="none",
        disable_tqdm=True, shuffle_dataset=False, beta=0.0, **settings(case),
    )  # fmt: skip


def trl_steps(
    case: Case, folder: str, args: Any, ours: Callable[[int], None], turns: Turns, error_of: Callable
) -> None:
    """TRL's train() over the same completions, ours taking its turn at the start of each step."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    groups = {group.problem.prompt: group for group in make_groups(case)}
    rewards = {(p, s.completion.token_ids): s.reward for p, group in groups.items() for s in group.refinements}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
        chosen = [groups[p].refinements[i % case.group_size].completion for i, p in enumerate(prompts)]
        return {
            "prompt_ids": [list(groups[p].prompt_ids) for p in prompts],
            "completion_ids": [list(c.token_ids) for c in chosen], "logprobs": [list(c.logprobs) for c in chosen],
        }  # fmt: skip

    def given(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [rewards[p, tuple(ids)] for p, ids in zip(prompts, completion_ids, strict=True)]

    class Timed(GRPOTrainer):
        """Knows how much of a step went into completions."""

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            ours(self.state.global_step)
            batch = super()._generate_and_score_completions(inputs)
            synchronize()
            self.not_learning = time.perf_counter() - start
            turns.tokens["trl"] = float(batch["prompt_ids"].numel() + batch["completion_ids"].numel())
            self.memory = MemoryOfAStep() if self.state.global_step == 1 else None
            return batch

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                turns.errors["trl"] = error_of(trainer.accelerator.unwrap_model(trainer.model))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            seconds = time.perf_counter() - self.start - trainer.not_learning
            if trainer.memory is not None:
                turns.peak_bytes["trl"] = trainer.memory.stop()
            if state.global_step > 2:  # counted up already
                turns.samples_ms.setdefault("trl", []).append(1e3 * seconds)

    trainer = Timed(folder, given, args, Dataset.from_dict({"prompt": list(groups)}), rollout_func=rollout)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    trainer.train()


class MemoryOfAStep:
    """Peak memory between here and `stop`, counted as `peak_extra_bytes` counts it."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            from benchmarks.measure import profile_of_allocations

            self.profile = profile_of_allocations()
            self.profile.start()

    def stop(self) -> int:
        from benchmarks.measure import peak_of

        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        self.profile.stop()
        return peak_of(self.profile)


@contextmanager
def quiet():
    """Accelerate's state is process-wide: whoever comes next starts afresh."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def rows(case: Case, turns: Turns, variant: str) -> list[dict]:
    """Record rows: tokens are those of the samples without padding, the same for everyone.

    Whose first gradient is wrong gets no figure.
    """
    groups = make_groups(case)
    real = sum(len(g.prompt_ids) + len(s.completion.token_ids) for g in groups for s in g.refinements)
    limit = GATE[case.bf16]
    made = []
    for name, samples in sorted(turns.samples_ms.items(), key=lambda item: item[0] != "trl"):
        error = turns.errors.get(name)
        right = error is None or error <= limit
        made.append({
            "op": "learner_step", "pass": "step", "impl": name.partition(",")[0], "provider": name, "shape": case.name,
            "tokens": real, "vocab": case.vocab, "hidden": case.hidden, "dtype": "bfloat16" if case.bf16 else "float32",
            "variant": variant, "time_ms": significant(statistics.median(samples)) if right else None,
            "floor_ms": None, "peak_extra_bytes": turns.peak_bytes.get(name), "max_rel_error": error,
            "note": "" if right else f"wrong: error {error:.1e} of the gradient exceeds {limit:.0e}",
            "samples": case.sequences, "computed_tokens": turns.tokens.get(name),
            "samples_ms": [significant(x) for x in samples] if right else [],
        })  # fmt: skip
    return made


def beside_trl(found: list[dict]) -> tuple[float, float] | None:
    """How many times faster, and lower in peak memory, our packed step with shared prompts is than TRL's."""
    by_name = {row["provider"]: row for row in found if row["op"] == "learner_step"}
    trl, ours = by_name.get("trl"), by_name.get(f"igrpo, {MODES[-1]}")
    if not (trl and ours and trl["time_ms"] and ours["time_ms"]):
        return None
    return trl["time_ms"] / ours["time_ms"], trl["peak_extra_bytes"] / ours["peak_extra_bytes"]
