"""A learner's steps on GPUs that are not there: the project's own code, at a recipe's real size, without weights.

    rehearsed = rehearse(model_config, config, devices=8, memory=80 * 10**9)
    rehearsed.peak                             bytes of the learner at its worst moment
    print("\\n".join(rehearsed.lines()))        by phase, by line, host waits, collectives

transformers builds the model from its config, ``Learner`` shards and trains it, torch computes shapes only. Stand-ins:
the attention kernels, which keep what the real ones keep, and the other processes. Two steps of two full micro-batches
are taken, the second with the optimiser's moments in place. The engine is not rehearsed: it takes what is left, of the
learner's peak or, where it sleeps while the learner works, of what that holds else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.plan.device_trace import DeviceTrace, Phase
from igrpo.plan.fake_devices import FakeGPUMode, fake_gpus
from igrpo.plan.memory import ASLEEP, GIB
from igrpo.settings import ConfigError

LOAD, TRY, BATCHES, STEP, PUSH = "loading", "trying kernels", "micro-batches", "clip and optimiser", "weight push"
MICRO_BATCHES = 2
SPREAD = 0.4
"""Of a group's completions around their mean length."""


@dataclass(frozen=True)
class Rehearsal:
    """What one process's GPU holds, and what it and the host wait for."""

    phases: dict[str, Phase]
    memory: int
    """Bytes of the GPU."""
    devices: int
    micro_batches: int
    """Of one process in one step."""
    tokens: int
    """Of the largest micro-batch."""
    share: float | None = None
    """Of the GPU, that an engine takes which sleeps while the learner works; None: it stays awake, or is elsewhere."""

    @property
    def peak(self) -> int:
        """While it trains; loading and the trial of kernels come before the engine, and have their own peaks."""
        return max(self.phases[name].peak for name in (BATCHES, STEP, PUSH))

    @property
    def held(self) -> int:
        """While it waits for an engine that sleeps when it works."""
        return self.phases[PUSH].held

    @property
    def left(self) -> int:
        """For an engine that is awake."""
        return self.memory - (self.peak if self.share is None else self.held)

    def lines(self, most: int = 8) -> list[str]:
        """A report for people: the ``most`` largest of each kind."""
        said = [
            f"{self.devices} x {self.memory / GIB:.1f} GiB, {self.micro_batches} micro-batches per step and process, "
            f"the largest of {self.tokens} tokens",
            "",
            f"{'phase':<20} {'peak GiB':>9} {'held after':>11}",
        ]
        said += [f"{name:<20} {p.peak / GIB:>9.2f} {p.held / GIB:>11.2f}" for name, p in self.phases.items()]
        said += ["", f"the learner's peak is {self.peak / GIB:.2f} GiB; {self._verdict()}", ""]
        worst = max((self.phases[name] for name in (BATCHES, STEP, PUSH)), key=lambda p: p.peak)
        said.append("alive at that moment, GiB, by what allocated it")
        said += [f"{size / GIB:9.2f}  {by}" for by, size in worst.alive.most_common(most)]
        for name in (BATCHES, STEP, PUSH):
            said += _traffic(name, self.phases[name], most)
        return said

    def _verdict(self) -> str:
        free = self.memory - self.peak - (0 if self.share is None else ASLEEP)
        if free < 0:
            return f"THE LEARNER DOES NOT FIT: {-free / GIB:.1f} GiB are missing"
        share = self.left / self.memory
        if self.share is None:
            return f"{self.left / GIB:.1f} GiB are left for an engine, a share of {share:.2f}"
        fits = "fits" if self.share <= share else "DOES NOT FIT"
        return (
            f"the engine sleeps meanwhile. Then the learner holds {self.held / GIB:.2f} GiB, and {self.left / GIB:.1f} "
            f"GiB are left for the engine, a share of {share:.2f}: vllm_gpu_memory_utilization: {self.share} {fits}"
        )


def _traffic(name: str, phase: Phase, most: int) -> list[str]:
    said = ["", f"{name}: the host waits {phase.waits.total()} times"]
    said += [f"{times:9}  {what}, {line}" for (what, line), times in phase.waits.most_common(most)]
    for operation, traffic in phase.collectives.items():
        said.append(f"{traffic.calls:9}  x {operation}, {traffic.bytes / GIB:.2f} GiB together")
    return said


def rehearse(
    model_config: Any, config: TrainConfig, devices: int, memory: int, *, prompt: int, completion: int, context: int
) -> Rehearsal:
    """Two steps of the learner.

    Args:
        model_config: transformers' config of the model.
        devices: processes that learn, FSDP2 where there are several.
        prompt: tokens of a prompt, the draft included.
        completion: mean tokens of a completion.
        context: tokens of the longest sequence, which fills a micro-batch where there is no ``token_budget``.

    Raises:
        ConfigError: what the learner refuses, or no C++ compiler.
    """
    if config.load_in_4bit:
        raise ConfigError("load_in_4bit: weights in 4 bits are not rehearsed; leave --rehearse out, or write false")
    config = replace(config, use_cpu=False, report_to="none")
    everyone = full_micro_batches(config, devices, prompt, completion, context)
    trace = DeviceTrace()

    def gathered(mine: Any) -> list[Any]:
        return everyone if mine and isinstance(mine[0], TrainingSample) else [mine] * devices

    gpus = fake_gpus(devices, memory, trace.wait, gathered)
    with gpus, _stand_ins(trace, config.use_peft), FakeGPUMode(), trace:
        return _steps(trace, model_config, config, everyone, memory)


def _steps(
    trace: DeviceTrace, model_config: Any, config: TrainConfig, everyone: Sequence[list[TrainingSample]], memory: int
) -> Rehearsal:
    from igrpo.learner.learner import Learner
    from igrpo.learner.packing import Limits, pack, unique_tokens

    with trace.phase(LOAD), trace.owned("weights"):
        model = _model(model_config, config, trace)
        reference = _model(model_config, config, trace) if config.has_reference else None
        with patch.object(Learner, "_find_form", trace.phase(TRY)(trace.owned("")(Learner._find_form))):
            learner = Learner(model, reference, config, 0)
    learner.set_schedule(10)
    with trace.phase("first step"):
        learner.train_on(everyone[0])
    with ExitStack() as phases:
        phases.enter_context(trace.phase(BATCHES))

        def on_progress(done: int, total: int) -> None:
            if done == total:
                phases.enter_context(trace.phase(STEP))

        learner.train_on(everyone[0], on_progress)
    with trace.phase(PUSH):
        learner.placement.drop_gradients()
        deque(learner.adapter_tensors() if config.sends_adapter else learner.named_tensors(), maxlen=0)
    del trace.phases["first step"], trace.phases[""]
    together = [sample for samples in everyone for sample in samples]
    bins = pack(together, Limits.of(config), shared=config.shared_prefix, processes=len(everyone))
    largest = max(map(unique_tokens, bins))
    share = config.vllm_gpu_memory_utilization if config.engine_sleeps else None
    return Rehearsal(trace.phases, memory, len(everyone), -(-len(bins) // len(everyone)), largest, share)


def _model(model_config: Any, config: TrainConfig, trace: DeviceTrace) -> Any:
    """As ``load_policy`` gives it, on the CPU."""
    from transformers import AutoModelForCausalLM

    from igrpo.models.loading import attention, prepared

    dtype = torch.bfloat16 if config.use_peft and config.bf16 else torch.float32
    options = {"dtype": dtype, "attn_implementation": attention(config)}
    with trace.fake_weights():
        return prepared(AutoModelForCausalLM.from_config(model_config, **options), config)


def full_micro_batches(
    config: TrainConfig, devices: int, prompt: int, completion: int, context: int
) -> list[list[TrainingSample]]:
    """Of each process: groups that fill ``MICRO_BATCHES`` micro-batches, completions of different lengths."""
    G, limit = config.num_generations, config.token_budget
    if limit is None:  # batches of so many completions: the longest there are
        lengths = [context - prompt] * G
        groups = -(-MICRO_BATCHES * config.per_device_train_batch_size // G)
    else:
        prompts = prompt * (1 if config.shared_prefix else G)
        together = max(1, limit // (prompts + G * completion))  # groups in a micro-batch
        mean = max(4, (limit // together - prompts) // G)
        lengths = [int(mean * (1 + SPREAD * (2 * i / (G - 1) - 1))) for i in range(G)]
        groups = MICRO_BATCHES * together
    taught = config.distillation_weight > 0
    return [
        [_sample(prompt, n, 1 + rank * groups + g, i, taught) for g in range(groups) for i, n in enumerate(lengths)]
        for rank in range(devices)
    ]


def _sample(prompt: int, completion: int, group: int, number: int, taught: bool) -> TrainingSample:
    """Its teacher's prompt is as long as its own, which holds a draft as well."""
    question = (3 + group % 97, 3 + group // 97) + (5,) * (prompt - 2)  # no two groups share it
    logps, advantage = (-0.5,) * completion, 1.0 if number % 2 else -1.0
    return TrainingSample(question, (7,) * completion, logps, advantage, teacher_prompt_ids=question if taught else ())


class _Attention(torch.autograd.Function):
    """Keeps for its backward pass what flash-attn and flex_attention keep: inputs, output, one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, out, sums = ctx.saved_tensors
        delta = torch.empty_like(sums)  # the kernels' one temporary
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        del delta, out
        return grads


@contextmanager
def _stand_ins(trace: DeviceTrace, adapters: bool) -> Iterator[None]:
    """For flex_attention, which would run uncompiled, SDPA, which would choose a kernel of the CPU, experts in float32,
    whose product fake tensors refuse, and what moves weights through ``.data``, which fake tensors do not follow."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init as fsdp
    from torch.nn import functional
    from transformers.integrations import flex_attention, moe

    def flex(query: Any, key: Any, value: Any, **options: Any) -> Any:
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return _Attention.apply(query, key, value), SimpleNamespace(lse=rows)

    def sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value)

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None:
            move([*module.parameters()], [*module.buffers()], device)
        return module

    def move(parameters: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], device: torch.device) -> None:
        for tensor in (*parameters, *buffers):
            trace.move(tensor, device)

    places = [
        (flex_attention, "compile_friendly_flex_attention", flex),
        (functional, "scaled_dot_product_attention", sdpa),
        (moe, "_can_use_grouped_mm", lambda input, weight, offs: weight.dtype == torch.bfloat16),
        (torch.nn.Module, "to", to),
        (fsdp, "_move_states_to_device", move),
    ]
    if adapters:
        import peft

        places.append((peft, "get_peft_model", trace.fake_weights()(peft.get_peft_model)))
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(patch.object(*place))
        yield
