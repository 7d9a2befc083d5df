"""One training step of a recipe on given hardware: seconds per stage, for GRPO and iGRPO alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

from igrpo.config.train_config import TrainConfig
from igrpo.machine import Machine, offloads_weights, this_machine
from igrpo.plan.generation import EngineCost, Lengths, generate
from igrpo.plan.hardware import GUESSED, Hardware, Rates
from igrpo.plan.memory import MemoryPlan, engine_weight_bytes, memory_plan, trained_parameters
from igrpo.plan.shapes import ModelShape

ALONE = 0.9
"""Share of a GPU's memory that vLLM takes where nothing learns beside it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; ``drafts`` counts only what refinements and learner do not hide."""

    name: str
    drafts: float
    refinements: float
    learner: float
    sync: float
    prompts: int
    completions: int
    learner_tokens: float

    @property
    def total(self) -> float:
        return self.drafts + self.refinements + self.learner + self.sync


@dataclass(frozen=True)
class Workload:
    """A model, a recipe, hardware and what completions look like."""

    shape: ModelShape
    config: TrainConfig
    hardware: Hardware
    lengths: Lengths
    rates: Rates = GUESSED
    prompts: int = 0
    """Per step, over all processes; 0: as the recipe says."""
    trained_share: float = 1.0
    """Of the completions: those of groups with equal rewards have no gradient and are skipped."""

    @property
    def prompts_per_step(self) -> int:
        return self.prompts or self.config.prompts_per_step * self.hardware.learners

    @property
    def budget(self) -> int:
        """Completions per prompt that GRPO gets at the same budget: N + G."""
        return self.config.num_drafts + self.config.num_generations

    def steps(self) -> list[StepTime]:
        """GRPO at the matched budget, then iGRPO under each scheduler."""
        grpo = self.step("GRPO", "barrier", 0, self.budget)
        N, G = self.config.num_drafts, self.config.num_generations
        return [grpo, *(self.step(f"iGRPO {name}", name, N, G) for name in ("barrier", "streaming", "lag 1"))]

    def slots(self) -> int:
        """Sequences an engine decodes at once: as many as the recipe says, or as their keys and values fit."""
        device, config = self.hardware.device, self.config
        parts = config.vllm_tensor_parallel_size
        if device.kind == "cpu":
            cache = config.vllm_cpu_kvcache_gib * 2**30
        else:
            share = ALONE if self.hardware.generation else config.vllm_gpu_memory_utilization
            cache = parts * share * device.memory - engine_weight_bytes(self.shape, self.config)
        context = self.prefix(config.num_drafts) + _mean(self.lengths, "refinement") / 2
        return max(1, min(config.vllm_max_num_seqs, int(cache / (self.shape.kv_bytes_per_token * context))))

    def engine_cost(self) -> EngineCost:
        device, rates = self.hardware.device, self.rates
        parts = self.config.vllm_tensor_parallel_size
        scale = rates.generation_scale / parts
        return EngineCost(
            weight_bytes=engine_weight_bytes(self.shape, self.config),
            parameters=self.shape.active_parameters,  # of many sequences together all experts are read
            kv_bytes_per_token=self.shape.kv_bytes_per_token,
            bandwidth=device.bandwidth * rates.bandwidth / scale,
            decode_flops=device.flops * rates.decode / scale,
            prefill_flops=device.flops * rates.prefill / scale,
            overhead=rates.decode_overhead * rates.generation_scale,
            slots=self.slots(),
        )

    def learner_tokens(self, N: int, G: int) -> float:
        """Tokens the learner computes per step: with a shared prefix a group's prompt counts once, else each time."""

        def group(prompt: float, completions: int, stage: str) -> float:
            return (1 if self.config.shared_prefix else completions) * prompt + completions * _mean(self.lengths, stage)

        refined, bare = self.prefix(N), self.lengths.question
        prompts = {"draft": (refined,), "bare": (bare,), "both": (refined, bare)}
        per_prompt = sum(
            group(prompt, G, "refinement") for prompt in prompts[self.config.refinement_context if N else "draft"]
        )
        if N and self.config.train_on_drafts:
            per_prompt += group(bare, N, "draft")
        return self.trained_share * self.prompts_per_step * per_prompt

    def learner_seconds(self, N: int, G: int) -> float:
        """Compute, or the network where that is slower: 6 FLOP per parameter and token in an update, 2 more to
        recompute, and 2 in a forward pass alone."""
        shape, device, rates = self.shape, self.hardware.device, self.rates
        context = self.prefix(N) + _mean(self.lengths, "refinement")
        # Scores and their values: 4 FLOP per pair and attention unit, half of the pairs are masked; times 3 with the
        # backward pass.
        attention = 3 * 4 * shape.num_layers * shape.attention_size * context / 2
        recompute = 4 / 3 if self.config.gradient_checkpointing else 1
        passes = self.config.num_iterations * recompute + self._forward_passes(N) / 3
        flops = self.learner_tokens(N, G) * (6 * shape.active_parameters + attention) * passes
        compute = flops / (self.hardware.learners * device.flops * rates.learner)
        return rates.learner_scale * max(compute, self._network_seconds(N, G))

    def _forward_passes(self, N: int) -> int:
        """Of a step, without a gradient: the reference's, the old policy's and a fixed teacher's, and in each update
        what balances experts and any other teacher's; with drafts to see, and as if every completion had a teacher."""
        config = self.config
        balances = bool(self.shape.experts) and config.router_aux_loss_coef != 0
        once = (config.beta > 0) + (config.num_iterations > 1 and not config.bypass_mode)
        teaches, fixed = N > 0 and config.distillation_weight > 0, config.teacher_model_kind == "base"
        return once + (teaches and fixed) + config.num_iterations * (balances + (teaches and not fixed))

    def prefix(self, N: int) -> float:
        """Tokens before a refinement: the question, and with N drafts those that are shown."""
        drafts = self.config.show_drafts * _mean(self.lengths, "draft")
        return self.lengths.question + (self.lengths.template + drafts if N else 0)

    def _network_seconds(self, N: int, G: int) -> float:
        """FSDP2, per micro-batch: in an update weights gathered twice, 2 bytes each, and gradients scattered once, in
        fp32; in a forward pass alone weights gathered once."""
        learners = self.hardware.learners
        if learners == 1:
            return 0.0
        if self.config.token_budget:
            batches = self.learner_tokens(N, G) / learners / self.config.token_budget
        else:
            batches = self.prompts_per_step * G / learners / self.config.per_device_train_batch_size
        size = (self.config.num_iterations * (2 * 2 + 4) + self._forward_passes(N) * 2) * self.shape.parameters
        return max(1.0, batches) * size / (self.hardware.network * self.rates.network)

    def sync_seconds(self) -> float:
        """bf16 weights or adapters: in the device if it also learns, else over the network, to all engines at once."""
        device, rates = self.hardware.device, self.rates
        remote = self.hardware.generation and self.hardware.count > device.per_node
        rate = device.fabric if remote else device.link if self.hardware.count > 1 else device.bandwidth
        alone = self.config.sends_adapter
        sent = trained_parameters(self.shape, self.config) if alone else self.shape.parameters
        return rates.sync_scale * (2 * sent / (rate * rates.network) + rates.sync_overhead)

    def memory(self) -> MemoryPlan:
        """Of one learning device, sharded where there are several."""
        learners = self.hardware.learners
        if self.hardware.device.kind == "cpu":
            machine = this_machine(use_cpu=True, processes=learners)
        else:
            machine = Machine("cuda", int(self.hardware.device.memory), learners, offloads_weights())
        return memory_plan(self.shape, self.placed, machine, context=self.context(), sharded=learners > 1)

    @property
    def placed(self) -> TrainConfig:
        """The recipe with its engine where the hardware has it."""
        return replace(self.config, vllm_mode="server" if self.hardware.generation else "colocate")

    def context(self) -> int:
        """Tokens of the longest sequence."""
        config = self.config
        draft = config.show_drafts * (config.draft_max_tokens or config.max_completion_length) + self.lengths.template
        return self.lengths.question + (draft if config.shows_draft else 0) + config.max_completion_length

    def step(self, name: str, scheduler: str, N: int, G: int) -> StepTime:
        """One step with N drafts (0: GRPO) and G trained completions per prompt."""
        engines = max(1, self.hardware.engines_on // self.config.vllm_tensor_parallel_size)
        sampled = generate(scheduler, self.prompts_per_step, N, G, self.lengths, self.engine_cost(), engines)
        tokens = self.learner_tokens(N, G)
        learner, sync = self.learner_seconds(N, G), self.sync_seconds()
        # What is left of lagging drafts when the learner is done: all of it where one device does both.
        exposed = max(0.0, sampled.hidden - (learner + sync if self.hardware.generation else 0.0))
        return StepTime(
            name, sampled.drafts + exposed, sampled.refinements, learner, sync, self.prompts_per_step,
            self.prompts_per_step * (N + G), tokens,
        )  # fmt: skip


def _mean(lengths: Lengths, stage: str) -> float:
    seen = lengths.observed_drafts if stage == "draft" else lengths.observed_refinements
    return sum(seen) / len(seen) if seen else lengths.mean
