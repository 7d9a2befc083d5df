"""The learner: float32 master weights, bf16 compute. The only file that imports accelerate."""

from __future__ import annotations

import math
import random
import resource
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import get_scheduler

from igrpo import batching
from igrpo.batching import Denominators, MicroBatch
from igrpo.config import ConfigError, TrainConfig
from igrpo.policy import Policy
from igrpo.types import TrainingSample
from igrpo_kernels import GRPOLossOutput

Metrics = dict[str, float]


class Learner:
    """Owns the policy, the optimiser and the schedule.

    Args:
        model: causal LM in float32.
        reference: frozen causal LM for the KL term, or None; needed when ``beta > 0``.
        pad_token_id: fills micro-batches; never seen by a real token.
    """

    def __init__(self, model: Any, reference: Any, config: TrainConfig, pad_token_id: int):
        self.config = config
        self.pad_token_id = pad_token_id
        report_to = [] if config.report_to == "none" else config.report_to.split(",")
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.bf16 else "no",
            cpu=config.use_cpu,
            log_with=report_to or None,
            project_dir=config.output_dir,
        )
        policy = Policy(model, config)
        policy.train()
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},  # norms and biases
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.scheduler: Any = None
        self.reference = None
        if reference is not None:
            self.reference = Policy(reference, config).requires_grad_(False).eval().to(self.accelerator.device)

    def set_schedule(self, total_steps: int) -> None:
        """The learning rate over ``total_steps`` optimiser steps.

        Raises:
            ConfigError: an unknown schedule or option.
        """
        # Not prepared by accelerate, which would step it once per process.
        self.scheduler = _schedule(self.optimizer.optimizer, self.config, total_steps)
        self.accelerator.register_for_checkpointing(self.scheduler)

    def start_trackers(self) -> None:
        name = self.config.run_name or Path(self.config.output_dir).name
        self.accelerator.init_trackers("igrpo", init_kwargs={"wandb": {"name": name}})

    @property
    def unwrapped(self) -> Any:
        """The Hugging Face model inside."""
        return self.accelerator.unwrap_model(self.policy).model

    def train_on(self, samples: Sequence[TrainingSample]) -> Metrics:
        """``num_iterations`` optimiser steps on this process's samples; the gradients of all processes are averaged."""
        totals = self._totals(samples)
        useful = batching.contributing(samples, self.config)
        micros = batching.micro_batches(useful, totals, self.config, self.pad_token_id)
        micros = [m.to(self.accelerator.device) for m in self._in_step(micros)]
        old = [self._log_probs(m, self.policy) for m in micros] if self.config.num_iterations > 1 else None
        reference = [self._log_probs(m, self.reference) for m in micros] if self.reference is not None else None
        metrics = _Accumulator()
        for _ in range(self.config.num_iterations):
            self._step(micros, old, reference, totals, metrics)
        result = metrics.means(self.accelerator)
        result["learner/sequences"] = float(len(useful))
        result["learner/sequences_skipped"] = float(len(samples) - len(useful))
        result["learner/tokens"] = float(sum(len(s.prompt_ids) + len(s.completion_ids) for s in useful))
        result["learner/padded_tokens"] = float(sum(m.input_ids.numel() for m in micros))
        result["learning_rate"] = self.last_learning_rate
        return result

    def _step(
        self,
        micros: list[MicroBatch],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        totals: Denominators,
        metrics: _Accumulator,
    ) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                out = self.policy(
                    micro,
                    old_per_token_logps=old[i] if old is not None else None,
                    ref_per_token_logps=reference[i] if reference is not None else None,
                    num_items_in_batch=totals.tokens,
                )
                # Processes average gradients, the denominators span all of them: hence the factor.
                loss = out.loss * micro.scale * self.accelerator.num_processes
                self.accelerator.backward(loss)
            loss_sum += float(out.loss.detach()) * micro.scale
            if micro.scale:
                metrics.add(micro, out)
        metrics.losses.append(loss_sum)
        for p in self.policy.parameters():  # a step without contributing samples is a step with a zero gradient
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm or math.inf)
        metrics.norms.append(float(norm))
        self.last_learning_rate = self.scheduler.get_last_lr()[0]
        if math.isfinite(float(norm)):
            self.optimizer.step()
        else:  # a step from a broken gradient cannot be taken back
            metrics.skipped_steps += 1
        self.scheduler.step()

    def _totals(self, samples: Sequence[TrainingSample]) -> Denominators:
        own = batching.count(samples)
        both = torch.tensor([own.sequences, own.tokens], device=self.accelerator.device)
        sequences, tokens = self.accelerator.reduce(both, reduction="sum").tolist()
        return Denominators(sequences, tokens)

    def _in_step(self, micros: list[MicroBatch]) -> list[MicroBatch]:
        """Collectives in the backward pass need every process to run as many micro-batches as the busiest one."""
        if self.accelerator.num_processes == 1:
            return micros
        counts = self.accelerator.gather(torch.tensor([len(micros)], device=self.accelerator.device))
        filler = batching.collate(
            [TrainingSample((self.pad_token_id,), (self.pad_token_id,), (0.0,), 0.0)],
            Denominators(1.0, 1.0),
            self.config.loss_type,
            self.pad_token_id,
        )
        values = {name: getattr(filler, name) for name in filler.__slots__} | {"scale": 0.0}
        return micros + [MicroBatch(**values)] * (int(counts.max()) - len(micros))

    @torch.no_grad()
    def _log_probs(self, micro: MicroBatch, policy: Any) -> torch.Tensor:
        with self.accelerator.autocast():
            return policy(micro, logps_only=True)

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each id after the first at temperature 1: what ``Engine.score`` must agree with."""
        ids = torch.tensor([list(token_ids)], device=self.accelerator.device)
        with self.accelerator.autocast():
            logits = self.unwrapped(input_ids=ids).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under their checkpoint names, in the engine's dtype; a tied head is sent once, as the embedding."""
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        for name, parameter in self.unwrapped.named_parameters():
            yield name, parameter.detach().to(dtype)

    def mean_over_processes(self, metrics: Metrics) -> Metrics:
        """Plain means of the figures; one that only some processes have is averaged over those."""
        if self.accelerator.num_processes == 1:
            return metrics
        everyone: list[Metrics] = gather_object([metrics])
        names = dict.fromkeys(name for one in everyone for name in one)
        return {name: fmean(one[name] for one in everyone if name in one) for name in names}

    def peak_memory_gib(self) -> float:
        """Of the accelerator where there is one, else of this process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def save(self, folder: Path, tokenizer: Any, extra: Any) -> None:
        """Writes ``folder``: the model for everyone, and ``folder/state`` to resume from."""
        self.accelerator.save_state(str(folder / "state"))
        if self.accelerator.is_main_process:
            dtype = torch.bfloat16 if self.config.bf16 else torch.float32
            weights = {name: t.detach().to(dtype) for name, t in self.unwrapped.state_dict().items()}
            self.unwrapped.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            torch.save(extra, folder / "state" / "loop.pt")

    def load(self, folder: Path) -> Any:
        """Restores weights, optimiser, schedule and random numbers; returns ``extra`` of ``save``."""
        try:
            self.accelerator.load_state(str(folder / "state"))
            return torch.load(folder / "state" / "loop.pt", weights_only=True)
        except (OSError, RuntimeError, KeyError) as error:
            raise ConfigError(f"resume_from_checkpoint: {folder} cannot be loaded ({error})") from error


class _Accumulator:
    """One figure per name over the micro-batches of a rollout batch: token-weighted means, and extremes by name."""

    def __init__(self) -> None:
        self.weighted: dict[str, torch.Tensor] = {}
        self.extremes: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.skipped_steps = 0

    def add(self, micro: MicroBatch, out: GRPOLossOutput) -> None:
        n = micro.completion_ids.numel()
        gap = (out.per_token_logps - micro.sampling_per_token_logps).abs()
        own = {"sampling/sampling_logp_difference/mean": gap.mean(), "sampling/sampling_logp_difference/max": gap.max()}
        for name, value in {**out.metrics, **own}.items():
            value = value.detach().float()
            if name.endswith(("min", "max")):
                pick = torch.minimum if name.endswith("min") else torch.maximum
                self.extremes[name] = pick(self.extremes[name], value) if name in self.extremes else value
            else:
                self.weighted[name] = self.weighted.get(name, 0.0) + value * n
        self.tokens += n

    def means(self, accelerator: Accelerator) -> Metrics:
        """Over this process's tokens; the loss is the sum over processes, since their shares add up to the whole."""
        loss = torch.tensor(fmean(self.losses), device=accelerator.device)
        result = {name: float(total) / self.tokens for name, total in self.weighted.items()}
        result |= {name: float(value) for name, value in self.extremes.items()}
        result["loss"] = float(accelerator.reduce(loss, reduction="sum"))
        result["grad_norm"] = fmean(self.norms)
        result["learner/skipped_steps"] = float(self.skipped_steps)
        return result


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> Any:
    options = dict(config.lr_scheduler_kwargs)
    if config.lr_scheduler_type == "cosine_with_min_lr" and not options:
        options = {"min_lr_rate": 0.1}
    warmup = config.warmup_steps if config.warmup_steps >= 1 else math.ceil(config.warmup_steps * total_steps)
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(warmup),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=options,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler_type / lr_scheduler_kwargs: {error}") from None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
