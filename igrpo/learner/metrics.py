"""The learner's figures: what its micro-batches measured, and what a step asked of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from igrpo.data_types import TrainingSample
from igrpo.learner.batching import MicroBatch
from igrpo.learner.experts import load_figures
from igrpo.learner.packing import Bin, padded_tokens, raw_tokens, unique_tokens
from igrpo_kernels import GRPOLossOutput

Metrics = dict[str, float]

SUMMED = re.compile(
    r"rollout/(draft_tokens|refinement_tokens|tokens_per_second|samples_per_second)|draft/aborted|resample/\w+"
    r"|aux_loss|(eval/)?rewards/.*/(not_judged|errors|timeouts)|rewards/workers_replaced|warnings|sync/restarts"
    r"|staleness/dropped"
)
"""Counts and rates of a process's own share, which are the run's when added up."""
GAP = "sampling/sampling_logp_difference"
AUX = "aux_loss"
DISTILLED = "self_distillation/distillation_loss"
_EXTREME = re.compile(r"(?:.*[/_])?(?:(max|max_length|peak_memory_gib|tensors_compared)|(min|min_length))")


class Accumulator:
    """One figure per name over the micro-batches of a rollout batch: token-weighted means, and extremes by name."""

    def __init__(self) -> None:
        self.weighted: dict[str, torch.Tensor] = {}
        self.extremes: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.steps: list[tuple[float, float]] = []
        """Loss and gradient norm of each optimiser step."""
        self._read: dict[str, float] = {}

    def add(self, micro: MicroBatch, out: GRPOLossOutput) -> None:
        n = micro.completion_ids.numel()
        figures = {k: v for k, v in out.metrics.items() if micro.corrected_tokens or not k.startswith("sampling/")}
        figures = {k: v for k, v in figures.items() if not k.startswith(GAP)}  # of all tokens, whatever they saw
        if (drawn := figures.pop(DISTILLED, None)) is not None and micro.taught_tokens:
            self._add(DISTILLED, drawn.detach() * micro.taught_tokens, micro.taught_tokens)
        if AUX in figures:
            self._add(AUX, figures.pop(AUX), 0)  # a share of its step's, no mean
        for name, values in _differences(micro, out).items():
            tokens = n - micro.own_tokens if name.startswith("bare/") else micro.own_tokens
            if tokens:
                self._add(name, values.sum(), tokens)
                if name.startswith("sampling/"):
                    figures[f"{GAP}/max"] = values.max()
        for name, value in figures.items():
            value = value.detach().float()
            if name.endswith(("min", "max")):
                pick = torch.minimum if name.endswith("min") else torch.maximum
                self.extremes[name] = pick(self.extremes[name], value) if name in self.extremes else value
            else:
                self._add(name, value * n, n)

    def add_load(self, load: torch.Tensor) -> None:
        """Of the experts, (layers, E), by the tokens of a whole step."""
        for name, value in load_figures(load).items():
            self._add(name, value, 1)

    def _add(self, name: str, total: torch.Tensor, tokens: int) -> None:
        self.weighted[name] = self.weighted.get(name, 0.0) + total
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def end_step(self, loss: torch.Tensor, norm: torch.Tensor, accelerator: Any) -> float:
        """The gradient's norm. Everything is read here at once: the host waits for the device once a step.

        Args:
            loss: () this process's share, which adds up over the processes.
        """
        total = accelerator.reduce(loss.float(), reduction="sum")
        kept = self.weighted | self.extremes
        numbers = torch.stack([x.to(total.device, torch.float64) for x in (total, norm, *kept.values())]).tolist()
        self.steps.append((numbers[0], numbers[1]))
        self._read = dict(zip(kept, numbers[2:], strict=True))
        return numbers[1]

    def means(self) -> Metrics:
        """Over this process's tokens; the loss is the sum over processes, since their shares add up to the whole."""
        losses, norms = zip(*self.steps, strict=True)
        result = {name: value / (self.tokens.get(name) or 1) for name, value in self._read.items()}
        if AUX in result:
            result["aux_loss"] /= len(self.steps)
        result["loss"], result["grad_norm"] = fmean(losses), fmean(norms)
        result["learner/skipped_steps"] = float(sum(not math.isfinite(norm) for norm in norms))
        return result


def _differences(micro: MicroBatch, out: GRPOLossOutput) -> dict[str, torch.Tensor]:
    """(n,) what learner and engine say about the same token: behind the same prompt, and where the engine had seen a
    draft. 0 for tokens of the other kind."""
    gap = (out.per_token_logps - micro.sampling_per_token_logps).abs().float()
    if micro.behaviour_per_token_logps is None:
        return {"sampling/sampling_logp_difference/mean": gap}
    moved = (out.per_token_logps - micro.behaviour_per_token_logps).float()
    return {
        "sampling/sampling_logp_difference/mean": gap.masked_fill(~moved.isnan(), 0.0),
        "bare/logp_gap": moved.nan_to_num(nan=0.0),
    }


def over_processes(everyone: Sequence[Metrics]) -> Metrics:
    """One figure per name from those of each process: a sum of counts and rates, extremes of extremes, else a plain
    mean. One that only some processes have is taken over those."""
    names = dict.fromkeys(name for one in everyone for name in one)
    return {name: _combine(name, [one[name] for one in everyone if name in one]) for name in names}


def _combine(name: str, values: list[float]) -> float:
    if SUMMED.fullmatch(name):
        return sum(values)
    extreme = _EXTREME.fullmatch(name)
    if extreme:
        return max(values) if extreme[1] else min(values)
    return fmean(values)


def work(
    samples: Sequence[TrainingSample], useful: Sequence[TrainingSample], bins: Sequence[Bin], packs: bool
) -> Metrics:
    """What the whole step asks of the learner, over all processes."""
    prompts, trained = ({s.prompt_ids for s in some} for some in (samples, useful))
    return {
        "learner/sequences": float(len(useful)),
        "learner/sequences_skipped": float(len(samples) - len(useful)),
        "learner/groups_skipped": float(len(prompts - trained)),
        "learner/raw_tokens": float(sum(map(raw_tokens, bins))),
        "learner/unique_tokens": float(sum(map(unique_tokens if packs else padded_tokens, bins))),
        "learner/micro_batches": float(len(bins)),
    }
