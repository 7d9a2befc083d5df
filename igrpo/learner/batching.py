"""Groups into samples, samples into the tensors of a micro-batch, and the denominators that make them add up.

A step's loss is a mean over all its S sequences (or all its tokens), computed in micro-batches on several processes.
Each micro-batch's own mean is scaled by its share of that denominator, so that the sum over micro-batches is the mean
over the step, whatever the split:

    L = sum_m (S_m / S) L_m    S_m: sequences of micro-batch m      losses that divide by sequences
    L = sum_m (n_m / n) L_m    n_m: its completion tokens           losses that divide by a call's tokens
    L = sum_m L_m              divided by n or P already            losses that take num_items_in_batch

Which is which: docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional as F

from igrpo.data_types import RolloutGroup, Routes, Scored, TrainingSample, written
from igrpo.learner.config import LearnerConfig
from igrpo.learner.copies import sent
from igrpo.learner.packed_attention import Layout
from igrpo.learner.packing import Bin, PrefixGroup, prefix_groups
from igrpo.models.routers import OWN
from igrpo_kernels import SamplingMask
from igrpo_kernels.losses import LOSSES


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts over one optimiser step and all processes."""

    sequences: float
    tokens: float
    prompts: float = 0.0
    positive_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """S sequences, packed into one row or padded on their right; the n completion tokens that the policy wrote one
    after the other. What tools said is read and never predicted."""

    input_ids: torch.Tensor  # (1, L) int64 packed, or (S, L) padded
    rows: torch.Tensor  # (n,) int64: positions in the flattened hidden states that predict the completion tokens
    completion_ids: torch.Tensor  # (n,) int64
    cu_seqlens: torch.Tensor  # (S+1,) int64
    advantages: torch.Tensor  # (S,) fp32
    sampling_per_token_logps: torch.Tensor  # (n,) fp32
    lengths: tuple[int, ...]
    """Completion tokens of each sequence, for the host."""
    scale: float
    """Share of the step's denominator; 0 for a filler that only keeps processes in step."""
    token_share: float
    """Share of the step's tokens."""
    readers: torch.Tensor | None = None
    """(L,) or (S·L,) fp32: weight of the sequences that read a token and predict one from it; 0 for padding."""
    prompt_lengths: torch.Tensor | None = None  # (S,) fp32: completion tokens of the sequence's prompt in the step
    nll_weights: torch.Tensor | None = None  # (n,) fp32
    sampling_mask: SamplingMask | None = None  # n sets
    position_ids: torch.Tensor | None = None  # (1, L) int64 packed
    routes: torch.Tensor | None = None
    """(L, layers, k) or (S·L, layers, k) int16: experts of each token; ``models.routers.OWN`` where nobody said. They
    stay in the computer's memory until they are read: of a whole step they are much."""
    layout: Layout | None = None
    """What reads what in a packed row."""
    attention_mask: torch.Tensor | None = None  # (S, L) int64 padded
    behaviour_per_token_logps: torch.Tensor | None = None
    """(n,) fp32, as sampled behind another prompt; NaN for what was sampled behind this one, None for all of that."""
    corrected_tokens: int = 0
    """Tokens, for the host, whose sampler's log-probability the loss knows."""
    own_tokens: int = 0
    """Tokens, for the host, that were sampled behind this prompt."""
    taught: torch.Tensor | None = None
    """(n,) bool: tokens with a teacher; None: none has."""
    teacher: MicroBatch | None = None
    """Those tokens behind the teacher's prompt."""

    @property
    def taught_tokens(self) -> int:
        return 0 if self.teacher is None else len(self.teacher.completion_ids)

    def to(self, device: torch.device) -> MicroBatch:
        values = {name: getattr(self, name) for name in self.__slots__}
        mask = None if self.sampling_mask is None else self.sampling_mask.to(device)
        tensors = sent({k: v for k, v in values.items() if isinstance(v, torch.Tensor) and k != "routes"}, device)
        return replace(self, **tensors, sampling_mask=mask)


def training_samples(groups: Sequence[RolloutGroup], config: LearnerConfig) -> list[TrainingSample]:
    """Refinements behind the prompt that ``refinement_context`` says; with ``train_on_drafts`` also the drafts, as
    groups under their bare prompts."""
    made: list[TrainingSample] = []
    weight = 0.5 if config.refinement_context == "both" else 1.0
    refined = [group for group in groups if group.chosen is not None]
    for group in groups:
        if group.chosen is None or config.refinement_context != "bare":
            share = 1.0 if group.chosen is None else weight
            # The answers to a question with a right draft that was not shown: `refine_only: dead`.
            teachers = _teachers(group, group.refinements) if group.chosen is None else ()
            made += _group_samples(
                group.prompt_ids, group.refinements, group.advantages, config, share, teachers=teachers
            )
    if config.refinement_context in ("bare", "both"):
        for group in refined:
            under_question = _group_samples(
                group.draft_prompt_ids, group.refinements, group.advantages, config, weight, group.copies,
                _teachers(group, group.refinements),
            )  # fmt: skip
            made += [_bare(one, config) for one in under_question]
    if config.train_on_drafts:
        for group in groups:
            teachers = _teachers(group, group.drafts)
            made += _group_samples(
                group.draft_prompt_ids, group.drafts, group.draft_advantages, config, teachers=teachers
            )
    return made


def _teachers(group: RolloutGroup, completions: Sequence[Scored]) -> list[tuple[int, ...]]:
    """Of each completion the prompt of its teacher, who never sees that completion itself."""
    first, other, *_ = (*group.teacher_prompts, (), ())
    shown = group.drafts[group.demonstrations[0]] if group.demonstrations else None
    return [other if scored is shown else first for scored in completions]


def _group_samples(
    prompt_ids: tuple[int, ...],
    completions: Sequence[Scored],
    advantages: Sequence[float],
    config: LearnerConfig,
    weight: float = 1.0,
    left_out: Sequence[bool] = (),
    teachers: Sequence[tuple[int, ...]] = (),
) -> list[TrainingSample]:
    if not any(advantages) and not any(teachers) and config.zero_variance != "keep":
        return []
    masked = [config.mask_truncated_completions and scored.completion.truncated for scored in completions]
    masked = [cut or copy for cut, copy in zip(masked, left_out or [False] * len(masked), strict=True)]
    lengths = [0 if out else len(s.completion.written_ids) for s, out in zip(completions, masked, strict=True)]
    return [
        TrainingSample(
            prompt_ids=prompt_ids,
            completion_ids=scored.completion.token_ids,
            sampling_logprobs=scored.completion.logprobs,
            advantage=advantage,
            masked=out,
            positive=scored.reward > 0,
            prompt_length=sum(lengths),
            opens_prompt=scored is completions[0],
            weight=weight,
            kept=scored.completion.kept,
            routes=scored.completion.routes,
            spans=scored.completion.spans,
            teacher_prompt_ids=teacher,
        )
        for scored, advantage, out, teacher in zip(
            completions, advantages, masked, teachers or [()] * len(masked), strict=True
        )
    ]


def _bare(sample: TrainingSample, config: LearnerConfig) -> TrainingSample:
    """Under the question alone. ``bare_importance_ratio: bare`` is RLTF-SD's: the sampler, which saw the draft, is not
    held against it (NaN is "no correction" for every implementation of the loss)."""
    sampled = sample.sampling_logprobs
    known = sampled if config.bare_importance_ratio == "behaviour" else (math.nan,) * len(sampled)
    return replace(sample, sampling_logprobs=known, behaviour_logprobs=sampled, routes=None)


def count(samples: Sequence[TrainingSample]) -> Denominators:
    """This process's share of the denominators: a masked sample is a sequence without tokens."""
    lengths = [0 if s.masked else s.trained_tokens for s in samples]
    return Denominators(
        sequences=float(sum(s.weight for s in samples)),
        tokens=float(sum(n * s.weight for n, s in zip(lengths, samples, strict=True))),
        prompts=float(sum(s.weight for s in samples if s.opens_prompt)),
        positive_tokens=float(sum(n * s.weight for n, s in zip(lengths, samples, strict=True) if s.positive)),
    )


def contributing(samples: Sequence[TrainingSample], config: LearnerConfig) -> list[TrainingSample]:
    """Samples with a gradient.

    Without the terms around it, nearly every loss here is a multiple of the advantage: A = 0 has no gradient and no
    loss, and leaving it out changes nothing but the work; unless its tokens help to rank the others, or it has a
    teacher.
    """
    term = LOSSES[config.loss_type].term
    every_token_counts = (
        config.beta > 0
        or config.kl_tau > 0
        or config.entropy_coef != 0
        or config.top_entropy_quantile < 1.0
        or term.couples == "batch"
        or not term.of_advantage
    )
    likely = config.positive_example_nll_weight > 0

    def moves(s: TrainingSample) -> bool:
        if s.teacher_prompt_ids or config.distillation_weight == 1:
            return bool(s.teacher_prompt_ids)
        return every_token_counts or s.advantage != 0.0 or (likely and s.positive)

    return [s for s in samples if s.completion_ids and not s.masked and moves(s)]


def behind_teachers(contents: Bin, shared: bool) -> Bin:
    """The samples that have a teacher, behind its prompt, in their order in the micro-batch: so a prompt is shared by
    neighbours alone."""
    taught = [
        replace(s, prompt_ids=s.teacher_prompt_ids, teacher_prompt_ids=(), routes=None)  # those of another prompt
        for group in contents
        for s in group.samples
        if s.teacher_prompt_ids
    ]
    if not shared:
        return tuple(prefix_groups(taught, shared=False))
    return tuple(PrefixGroup(ids, tuple(run)) for ids, run in groupby(taught, key=lambda s: s.prompt_ids))


def micro_batch(
    contents: Bin,
    totals: Denominators,
    loss_type: str,
    pad_token_id: int | None = None,
    positive_nll_weight: float = 0.0,
) -> MicroBatch:
    """The tensors of one micro-batch, whose samples are of one weight.

    Args:
        positive_nll_weight: of the mean of -log-prob over the step's positive tokens. The weights of this part of it
            are divided by the factor that multiplies the micro-batch's loss.
        pad_token_id: None packs; an id pads each sequence to the longest, for models that cannot read packed ones.
    """
    samples = [s for group in contents for s in group.samples]
    sizes = [s.trained_tokens for s in samples]
    sampled = [x for s in samples for x in written(s.sampling_logprobs, s.spans)]
    (weight,) = {s.weight for s in samples}
    inputs = _packed(contents) if pad_token_id is None else _padded(samples, pad_token_id)
    inputs["readers"] *= weight
    if known := next((s.routes for s in samples if s.routes is not None), None):
        inputs["routes"] = _routes(contents, known, None if pad_token_id is None else inputs["input_ids"].shape[1])
    reduction = LOSSES[loss_type].reduction
    scale = reduction.share(len(samples), sum(sizes), totals.sequences, totals.tokens)
    prompt_lengths = [float(s.prompt_length) for s in samples]
    nll = positive_nll_weight / (max(totals.positive_tokens, 1.0) * scale)
    return MicroBatch(
        completion_ids=torch.tensor([t for s in samples for t in written(s.completion_ids, s.spans)]),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0),
        advantages=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        sampling_per_token_logps=torch.tensor(sampled, dtype=torch.float32),
        lengths=tuple(sizes),
        scale=scale * weight,
        token_share=weight * sum(sizes) / max(totals.tokens, 1.0),
        prompt_lengths=torch.tensor(prompt_lengths) if reduction.items == "prompts" else None,
        nll_weights=torch.tensor([nll * s.positive for s in samples for _ in range(s.trained_tokens)]) if nll else None,
        behaviour_per_token_logps=_behaviour(samples),
        corrected_tokens=sum(not math.isnan(x) for x in sampled),
        own_tokens=sum(s.trained_tokens for s in samples if s.behaviour_logprobs is None),
        sampling_mask=_sampling_mask(samples),
        taught=_taught(samples),
        **inputs,
    )


def _taught(samples: Sequence[TrainingSample]) -> torch.Tensor | None:
    if not any(s.teacher_prompt_ids for s in samples):
        return None
    return torch.tensor([bool(s.teacher_prompt_ids) for s in samples for _ in range(s.trained_tokens)])


def _behaviour(samples: Sequence[TrainingSample]) -> torch.Tensor | None:
    if all(s.behaviour_logprobs is None for s in samples):
        return None
    elsewhere = [s.behaviour_logprobs or (math.nan,) * len(s.completion_ids) for s in samples]
    return torch.tensor(
        [x for s, some in zip(samples, elsewhere, strict=True) for x in written(some, s.spans)], dtype=torch.float32
    )


def _sampling_mask(samples: Sequence[TrainingSample]) -> SamplingMask | None:
    """What was left to choose from, token by token; None where nobody said."""
    kept = [s.kept for s in samples if s.kept is not None]
    if not kept:
        return None
    if len(kept) < len(samples):
        raise ValueError(f"what the sampler kept is known of {len(kept)} samples of {len(samples)}; a loss takes all")
    ids, counts = (torch.tensor(memoryview(b"".join(parts)).cast("i"), dtype=torch.int64)
                   for parts in ([k.ids for k in kept], [k.counts for k in kept]))  # fmt: skip
    return SamplingMask(ids, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))


def _packed(contents: Bin) -> dict[str, Any]:
    """Each group's prompt, then its completions without their last tokens; one run where nothing is shared."""
    ids: list[int] = []
    lengths: list[int] = []
    parents: list[int | None] = []
    readers: list[float] = []
    rows: list[int] = []
    for group in contents:
        last, prompt_run = len(ids) + len(group.prompt_ids) - 1, len(lengths)
        ids.extend(group.prompt_ids)
        lengths.append(len(group.prompt_ids))
        parents.append(None)
        readers.append(len(group.samples))
        for s in group.samples:
            *read, _ = s.completion_ids
            # The last prompt position predicts the first completion token, each completion token the next.
            rows += written((last, *range(len(ids), len(ids) + len(read))), s.spans)
            ids.extend(read)
            if len(group.samples) == 1:
                lengths[prompt_run] += len(read)
            elif read:
                lengths.append(len(read))
                parents.append(prompt_run)
                readers.append(1.0)
    layout = Layout(tuple(lengths), tuple(parents))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": layout.positions()[None],
        "layout": layout,
        "rows": torch.tensor(rows),
        "readers": torch.tensor(readers, dtype=torch.float32).repeat_interleave(torch.tensor(lengths)),
    }


def _routes(contents: Bin, like: Routes, padded_to: int | None) -> torch.Tensor:
    """(tokens, layers, k) in the order of ``_packed``, or of ``_padded`` rows of ``padded_to`` tokens."""

    def rows(s: TrainingSample) -> torch.Tensor:
        count = len(s.prompt_ids) + len(s.completion_ids) - 1
        # Of a completion that went on under new weights an engine may say less.
        if s.routes is None or len(s.routes.ids) != 2 * count * like.layers * like.k:
            return torch.full((count, like.layers, like.k), OWN, dtype=torch.int16)
        return torch.frombuffer(bytearray(s.routes.ids), dtype=torch.int16).view(count, like.layers, like.k)

    parts = []
    for group in contents:
        each = [rows(s) for s in group.samples]
        prompt = len(group.prompt_ids)
        if padded_to is None:
            parts += [each[0][:prompt], *(one[prompt:] for one in each)]
        else:
            parts += [F.pad(one, (0, 0, 0, 0, 0, padded_to - len(one)), value=OWN) for one in each]
    return torch.cat(parts)


def _padded(samples: Sequence[TrainingSample], pad_token_id: int) -> dict[str, Any]:
    length = max(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
    input_ids = torch.full((len(samples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    readers = torch.zeros(len(samples), length)
    rows: list[int] = []
    for i, s in enumerate(samples):
        ids = (*s.prompt_ids, *s.completion_ids)
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        readers[i, : len(ids) - 1] = 1.0
        first = i * length + len(s.prompt_ids) - 1
        rows += written(tuple(range(first, first + len(s.completion_ids))), s.spans)
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "rows": torch.tensor(rows),
        "readers": readers.flatten(),
    }  # fmt: skip
