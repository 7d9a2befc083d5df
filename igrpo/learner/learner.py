"""The learner: float32 master weights, bf16 compute, packed micro-batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from igrpo.data_types import TrainingSample
from igrpo.learner import batching
from igrpo.learner import state as learner_state
from igrpo.learner.adapters import Adapters, sent_name
from igrpo.learner.batch_form import EXACT, ROUNDED, Form, find_form, rounds
from igrpo.learner.batching import Denominators, MicroBatch
from igrpo.learner.config import LearnerConfig
from igrpo.learner.copies import Away, fetched
from igrpo.learner.dealing import deal, light
from igrpo.learner.experts import without_routers
from igrpo.learner.metrics import Accumulator, Metrics, over_processes, work
from igrpo.learner.optimizer import build_schedule
from igrpo.learner.packed_attention import packed_kernel
from igrpo.learner.packing import Bin, Limits, PrefixGroup, pack, pad
from igrpo.learner.placements import Placement, launched
from igrpo.learner.policy import Policy
from igrpo.learner.teacher import Average, topk_rows
from igrpo.machine import peak_resident
from igrpo.models.four_bits import plain
from igrpo.models.rotary import pin_rotary
from igrpo.models.saved_format import SavedFormat, tensors_of
from igrpo.settings import ConfigError
from igrpo_kernels.losses import LOSSES

OnProgress = Callable[[int, int], None]
"""Told after each micro-batch how many of the step's are done."""


class Learner:
    """Owns the policy, the optimiser and the schedule.

    Args:
        model: causal LM in float32; with ``use_peft`` its weights are frozen and may be bfloat16.
        reference: frozen causal LM that the run began with; where ``config.has_reference``, else None.
        pad_token_id: fills micro-batches of models that cannot be packed; never seen by a real token.
        context: of the engine in tokens, which decides rotary factors that depend on length; None: not known.

    Raises:
        ConfigError: an optimiser or adapter that cannot be had, or a model whose log-probabilities cannot be computed.
    """

    def __init__(
        self, model: Any, reference: Any, config: LearnerConfig, pad_token_id: int, context: int | None = None
    ):
        self.config, self.dtype = config, torch.bfloat16 if config.bf16 else torch.float32
        # A padding token may have been added to the tokenizer alone; any other fills as well.
        self.pad_token_id = pad_token_id if pad_token_id < len(model.get_input_embeddings().weight) else 0
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.bf16 else "no",
            cpu=config.use_cpu,
            log_with=config.trackers or None,
            project_dir=config.output_dir,
        )
        self.saved_format = SavedFormat(model)
        self.adapters = Adapters(model, config) if config.use_peft else None
        kind = launched(self.accelerator.num_processes)
        if self.adapters is not None:
            kind.check_adapters(self.adapters)
        models = [m for m in (model, reference) if m is not None]
        for one in models:
            pin_rotary(one, context)
        self.unwrapped, self.policy = model, Policy(model, config).train()
        self.placement = kind(self.policy, config, self.accelerator)
        self.reference = None
        if reference is not None:
            frozen = Policy(reference, config).requires_grad_(False).eval()
            self.reference = kind(frozen, config, self.accelerator, trains=False)
        averages, rate = config.averages_weights, config.teacher_update_rate
        self.average = Average(self.policy, self.placement, rate) if averages else None
        self._find_form(models, context)
        self.scheduler: Any = None

    def _find_form(self, models: Sequence[Any], context: int | None) -> None:
        nothing, config = Denominators(1.0, 1.0), self.config
        in_float32 = not config.bf16 or not (self.placement.divides or config.use_peft)

        def log_probs(groups: Bin, form: Form) -> torch.Tensor:
            micro = self._micro_batch(groups, nothing, form is Form.PACKED)
            exact = in_float32 and not rounds(models[0].config._attn_implementation)
            return self._log_probs(micro, temperature=1.0, own=form is Form.OWN, exact=exact)

        asked = models[0].config._attn_implementation
        kernels = list(dict.fromkeys((packed_kernel(asked, self.accelerator.device), "sdpa")))
        allowed = EXACT.get(self.accelerator.device.type, EXACT["cuda"]) if in_float32 else ROUNDED

        def agree(wrong: str | None) -> str | None:
            return next((one for one in self.gather(wrong) if one is not None), None)

        form = find_form(models, log_probs, kernels, context, allowed, self._say, agree)
        self.packs, self.pads = form is Form.PACKED, form is not Form.ALONE
        if self.policy.aux_coef and self._expert_load([self._filler()]) is None:  # its config spoke of experts
            self.policy.aux_coef = without_routers(models[0].config, config)
        if (routers := self.policy.routers) is not None:
            routers.note()
            self._log_probs(self._filler())
            routers.of_rows(1)  # refuses those that cannot be told what to choose
            routers.noted = None
        self.placement.settle()  # before an engine looks for what is free

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)

    def set_schedule(self, total_steps: int) -> None:
        """The learning rate over ``total_steps`` optimiser steps.

        Raises:
            ConfigError: an unknown schedule or option.
        """
        self.scheduler = build_schedule(self.placement.optimizer, self.config, total_steps)

    def train_on(
        self, samples: Sequence[TrainingSample], on_progress: OnProgress = lambda done, total: None
    ) -> Metrics:
        """``num_iterations`` optimiser steps on the samples of all processes, each of which computes an equal share."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_device(self.accelerator.device)  # per thread, and this may not be the main one
        processes = self.accelerator.num_processes
        everyone = gather_object([*map(light, samples)]) if processes > 1 else list(samples)
        totals = batching.count(everyone)
        bins = self._plan(useful := batching.contributing(everyone, self.config))
        micros = [self._micro_batch(one, totals, self.packs) for one in deal(bins, everyone, samples, self.accelerator)]
        share = max(math.ceil(len(bins) / processes), self.placement.least_micro_batches)
        micros += [self._filler()] * (share - len(micros))
        old = reference = None
        if self.config.bypass_mode:
            old = [m.sampling_per_token_logps for m in micros]
        elif self.config.num_iterations > 1:
            old = [self._log_probs(m) for m in micros]
        if self.config.beta > 0:
            with self._initial() as initial:
                reference = [self._log_probs(micro, initial) for micro in micros]
        metrics, teachers = Accumulator(), None
        for _ in range(self.config.num_iterations):
            if teachers is None or self.config.teacher_model_kind != "base":
                teachers = self._teachers(micros)
            self._step(micros, old, reference, teachers, totals, metrics, on_progress)
        return metrics.means() | work(everyone, useful, bins, self.packs) | {"learning_rate": self.last_learning_rate}

    def _step(
        self,
        micros: list[MicroBatch],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        teachers: list[dict[str, Away]],
        totals: Denominators,
        metrics: Accumulator,
        on_progress: OnProgress,
    ) -> None:
        self.placement.settle()
        self.placement.drop_gradients()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        load = self._expert_load(micros)
        if load is not None:
            metrics.add_load(load)
        for i, micro in enumerate(micros):
            with self.placement.micro_batch(last=i == len(micros) - 1):
                out = self.placement(
                    micro,
                    old_per_token_logps=old[i] if old is not None else None,
                    ref_per_token_logps=reference[i] if reference is not None else None,
                    num_items_in_batch=getattr(totals, LOSSES[self.config.loss_type].reduction.items),
                    expert_load=load,
                    **{name: fetched(kept) for name, kept in teachers[i].items()},
                )
                # Processes average gradients, the denominators span all of them: hence the factor.
                loss = out.loss * micro.scale * self.accelerator.num_processes
                self.placement.backward(loss)
            loss_sum += out.loss.detach().double() * micro.scale
            if micro.scale:
                metrics.add(micro, out)
            on_progress(i + 1, len(micros))
        self.last_learning_rate = self.scheduler.get_last_lr()[0]
        if self.adapters is not None and (idle := self.adapters.untrained()):
            self._say(
                f"warning: no gradient reached the adapters of {', '.join(idle)}: the model did not call these layers"
            )
        norm = self.placement.clip(self.config.max_grad_norm or math.inf)
        self.placement.step(metrics.end_step(loss_sum, norm, self.accelerator))
        if self.average is not None:
            self.average.follow()
        self.scheduler.step()

    def _plan(self, samples: Sequence[TrainingSample]) -> list[Bin]:
        """Micro-batches of the whole step, the same list in every process; each holds samples of one weight."""
        limits, bins = Limits.of(self.config), []
        for weight in sorted({s.weight for s in samples}):
            alike = [s for s in samples if s.weight == weight]
            if not self.packs:
                bins += pad(alike, limits if self.pads else Limits(completions=1))
                continue
            shared, processes = self.config.shared_prefix, self.accelerator.num_processes
            bins += pack(alike, limits, shared=shared, processes=processes)
        return bins

    def _micro_batch(self, contents: Bin, totals: Denominators, packed: bool) -> MicroBatch:
        pad = None if packed else self.pad_token_id
        nll = self.config.positive_example_nll_weight
        made = batching.micro_batch(contents, totals, self.config.loss_type, pad, nll).to(self.accelerator.device)
        if made.taught is None:
            return made
        behind = batching.behind_teachers(contents, packed and self.config.shared_prefix)
        return replace(made, teacher=self._micro_batch(behind, totals, packed))

    def _filler(self) -> MicroBatch:
        """Counts for nothing: collectives in the backward pass need the same number of micro-batches everywhere."""
        nothing = TrainingSample((self.pad_token_id,), (self.pad_token_id,), (0.0,), 0.0)
        made = self._micro_batch((PrefixGroup(nothing.prompt_ids, (nothing,)),), Denominators(1.0, 1.0), self.packs)
        return replace(made, scale=0.0, readers=torch.zeros_like(made.readers))

    @torch.no_grad()
    def _log_probs(self, micro: MicroBatch, placed: Placement | None = None, **options: Any) -> torch.Tensor:
        """(n,) without dropout, of the policy that trains unless another is given; see ``Policy`` for the options."""
        placed = placed or self.placement
        with placed.evaluating():
            return placed(micro, logps_only=True, **options)

    @torch.no_grad()
    def _expert_load(self, micros: Sequence[MicroBatch]) -> torch.Tensor | None:
        """(layers, E) of the whole step, all processes together, by a forward pass more; None: of a model that balances
        nothing, or of no micro-batches."""
        if not self.policy.aux_coef or not micros:
            return None
        with self.placement.evaluating():
            loads = [self.placement(micro, load_only=True) for micro in micros]
        load = self.accelerator.reduce(torch.stack(loads).sum(0), reduction="sum")
        return load if load.numel() else None

    def _teachers(self, micros: Sequence[MicroBatch]) -> list[dict[str, Away]]:
        """What the teacher says of each micro-batch. Every process reads as often as the others do."""
        if not self.config.distillation_weight:
            return [{} for _ in micros]
        alone, found = self.accelerator.num_processes == 1, []
        with self._teaching() as teacher:
            for micro in micros:
                top = None
                if micro.teacher is not None or not alone:
                    top = self._log_probs(micro.teacher or self._filler(), teacher, top_k=self.config.distillation_topk)
                found.append(topk_rows(micro, top if micro.teacher is not None else None))
        return found

    def _teaching(self) -> AbstractContextManager[Placement | None]:
        """The weights of `teacher_model_kind`; None: the policy, with those that it has in here."""
        if self.average is not None:
            return self.average.instead()
        return self._initial() if self.config.teacher_model_kind == "base" else nullcontext()

    @contextmanager
    def _initial(self) -> Iterator[Placement | None]:
        """The model the run began with; None: the policy, whose adapters are out of it in here."""
        with self.adapters.disabled() if self.adapters is not None else nullcontext():
            yield self.reference
        if self.reference is not None:
            self.reference.settle()  # its head does not stay whole beside the policy's

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each id after the first at temperature 1: what ``Engine.score`` must agree with."""
        ids = tuple(token_ids)
        sample = TrainingSample(ids[:1], ids[1:], (0.0,) * (len(ids) - 1), 0.0)
        micro = self._micro_batch((PrefixGroup(ids[:1], (sample,)),), Denominators(1.0, 1.0), self.packs)
        return self._log_probs(micro, temperature=1.0).tolist()

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that ``save_pretrained`` writes, under its names, in the engine's dtype.

        Adapters come merged into their layers. Every process must take every tensor: shards are gathered one by one.
        """
        saved = self.saved_format
        if self.adapters is None:
            return saved.convert(self._full_tensors(self.dtype))
        merged = self.adapters.merged(self._full_tensors())
        return saved.convert((name, tensor.to(saved.dtype(name, tensor, self.dtype))) for name, tensor in merged)

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapters' factors alone, named as in peft's files, in the engine's dtype."""
        self._settle()
        for name, tensor in tensors_of(self.unwrapped):
            if ".lora_" in name:
                yield sent_name(name), self.placement.whole(tensor, self.dtype)

    def _settle(self) -> None:
        # A scoring pass leaves the head gathered: that is FSDP's own memory, which no one else may come to hold.
        for placed in filter(None, (self.placement, self.reference)):
            placed.settle()

    def _full_tensors(self, compute: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers that a checkpoint has, and the factors of adapters, under their names in the model; as
        they are, or as they are written where the model computes in ``compute``."""
        self._settle()
        for name, tensor in tensors_of(self.unwrapped):
            if ".lora_" in name or self.saved_format.keeps(name.replace(".base_layer", "")):
                tensor = plain(tensor)
                dtype = None if compute is None else self.saved_format.dtype(name, tensor, compute)
                yield name, self.placement.whole(tensor, dtype)

    def gather(self, one: Any) -> list[Any]:
        """One plain object of each process, in the order of the processes, at every process."""
        return gather_object([one]) if self.accelerator.num_processes > 1 else [one]

    def over_processes(self, metrics: Metrics) -> Metrics:
        """The run's figures from those of each process; equal at every process."""
        return over_processes(self.gather(metrics)) if self.accelerator.num_processes > 1 else metrics

    def hours(self, seconds: float) -> Metrics:
        """What ``seconds`` of all processes cost: ``gpu_hours``, or ``core_hours`` where there is no GPU."""
        spent = seconds * self.accelerator.num_processes / 3600
        if self.accelerator.device.type == "cuda":
            return {"gpu_hours": spent}
        return {"core_hours": spent * torch.get_num_threads()}

    def peak_memory_gib(self) -> float:
        """Of the accelerator where there is one, else of this process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return peak_resident() / 2**30

    def save(self, folder: Path, tokenizer: Any, extra: Any) -> None:
        """Writes ``folder``: the model for everyone, and ``folder/state`` to resume from."""
        main, state = self.accelerator.is_main_process, folder / "state"
        state.mkdir(parents=True, exist_ok=True)
        learner_state.save_random_numbers(state, self.accelerator.process_index)
        self.placement.save(state)
        if self.average is not None:
            self.average.save(state)
        weights = {name: tensor.cpu() for name, tensor in self.named_tensors() if main}
        trained = self._full_tensors() if self.adapters is not None else ()
        adapters = [(name, tensor.cpu()) for name, tensor in trained if main and ".lora_" in name]
        if main:
            model = self.unwrapped
            # Already as they are to be written: the rules must not be applied twice.
            model.save_pretrained(folder, state_dict=weights, save_original_format=False)
            written = copy.deepcopy(model.config)  # which named the dtype of the master weights
            written.dtype = self.dtype
            written.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if self.adapters is not None:
                self.adapters.save(folder / "adapter", iter(adapters))
            learner_state.save_loop(self.scheduler, extra, state)

    def load(self, folder: Path) -> Any:
        """Restores weights, optimiser, schedule and random numbers; returns ``extra`` of ``save``.

        Raises:
            ConfigError: the folder does not hold them, or would have to be unpickled (``trust_checkpoint``).
        """
        state, trust = folder / "state", self.config.trust_checkpoint
        try:
            self.placement.load(state, trust)
            if self.average is not None:
                self.average.load(state)
            extra = learner_state.load_loop(self.scheduler, state, trust)
            learner_state.load_random_numbers(state, self.accelerator.process_index, trust)
        except ConfigError:
            raise
        except Exception as error:  # whatever torch, safetensors and optimisers raise at what is not what they wrote
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConfigError(f"resume_from_checkpoint: {folder} cannot be loaded ({reason})") from error
        return extra


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's random numbers."""
    set_seed(seed)
