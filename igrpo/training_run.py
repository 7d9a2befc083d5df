"""Puts a run together from its config, in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from igrpo.config.train_config import TrainConfig
from igrpo.config.unused import say_unused
from igrpo.data.feed import ProblemFeed, steps_of
from igrpo.data.sources import ProblemSampler, load_data
from igrpo.data_types import Problem, RolloutGroup
from igrpo.engines import masks, routes
from igrpo.engines.base import UNKNOWN_VERSION
from igrpo.engines.layout import beside_the_learner, visible_gpus
from igrpo.environments.setup import start_environment
from igrpo.machine import local_processes, this_machine
from igrpo.model_card import check_hub, upload, upload_command, write_card
from igrpo.rewards.columns import check_columns
from igrpo.rewards.setup import start_rewards
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rewards.workers.tally import check_tallies
from igrpo.run.checkpoints import checkpoints, find_checkpoint, place
from igrpo.run.folder import RunFolder, group_record, table_rows
from igrpo.run.output_folder import claimed
from igrpo.run.trackers import show_table, tracked
from igrpo.settings import ConfigError
from igrpo.terminal import Warnings

if TYPE_CHECKING:
    from igrpo.rollout.rollout import RolloutStats


@dataclass
class TrainingRun:
    """A run in progress: the parts, and how far it is."""

    config: TrainConfig
    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    feed: ProblemFeed
    tokenizer: Any
    prompts: Any
    rewards: RewardPool
    engine: Any
    rollout: Any
    learner: Any
    sync: Any
    folder: RunFolder
    timeline: Any
    view: Any
    total_steps: int
    step: int = 0
    warnings: Warnings = field(default_factory=Warnings)
    started: float = field(default_factory=time.monotonic)

    def sample(self, step: int) -> tuple[list[RolloutGroup], RolloutStats]:
        """The step's groups; what comes after them may still be on its way."""
        self._awake()
        batch = self.feed.take(left=self.total_steps - step)
        self.view.begin_step(len(batch.problems))
        substitutes = iter(batch.substitutes)
        groups, stats = self.rollout.run(batch.problems, step, self.view.rolled_out, batch.ahead, substitutes)
        self.feed.give_back(used=len(batch.substitutes) - sum(1 for _ in substitutes))
        return groups, stats

    def _awake(self) -> None:
        """Pushes to an engine that has slept since a checkpoint. ``save`` does not: after a signal nobody samples."""
        if any(self.learner.gather(self.engine.version == UNKNOWN_VERSION)):
            self.push_weights(self.step)

    def train_on(self, groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
        """The learner step, while the engine sleeps or goes on with the next steps' problems."""
        from igrpo.learner.batching import training_samples

        samples = training_samples(groups, self.config)
        with self.timeline.span("learner", step):
            self.engine.sleep()
            return self.rollout.during(lambda: self.learner.train_on(samples, self.view.learned))

    def push_weights(self, version: int) -> dict[str, float]:
        """Weights to the engine, compared on the probe (see ``sync``).

        Requests that still run go on under the new weights; with full determinism they are waited for, since how far
        they have come when the learner is done is a matter of time.

        Raises:
            EngineError: the push failed, or the engine does not hold the pushed weights.
        """
        if self.config.full_determinism:
            self.rollout.finish()
        with self.timeline.span("sync", version):
            return self.sync.push(version)

    def evaluate(self, when: str) -> dict[str, float]:
        """Bare-prompt figures over the held-out problems; printed and logged. Empty without any."""
        from igrpo.eval.sampling import evaluate

        if not self.held_out:
            return {}
        self._awake()
        self.view.stage("evaluation")
        self.rollout.finish()
        with self.timeline.span("eval", self.step):
            parts = (self.engine, self.rewards, self.prompts, self.tokenizer)
            share = self.held_out[self.feed.rank :: self.feed.processes]
            figures = evaluate(*parts, share, self.config, self.learner.gather, self.rollout.pump.turns)
        self.view.say(
            f"bare-prompt accuracy {when}: {figures['eval/accuracy']:.1%} of {len(self.held_out)} problems "
            f"(reward {figures['eval/reward']:.2f})"
        )
        figures |= self.check_rewards(f"the evaluation {when}")
        self.view.note(figures)
        if self.learner.accelerator.is_main_process:
            self.folder.log_metrics(self.step, figures)
            self.learner.accelerator.log(figures, step=self.step)
        return figures

    def check_rewards(self, what: str) -> dict[str, float]:
        """How many completions each function failed on, all processes together, as figures of an evaluation.

        Raises:
            RewardError: a function failed on all of them, and ``stop_on_reward_failure`` is set.
        """
        everyone = self.learner.gather(self.rewards.tallies())
        if self.config.stop_on_reward_failure:
            check_tallies(everyone, what)
        return {f"eval/rewards/{name}/errors": float(sum(one[name].failed for one in everyone)) for name in everyone[0]}

    def due(self, every: float | None) -> bool:
        """Whether this step is one of every so many, or of every such share of all steps; None and 0: never."""
        if not every:
            return False
        return self.step % (math.ceil(every * self.total_steps) if every < 1 else int(every)) == 0

    def log(self, groups: Sequence[RolloutGroup], metrics: dict[str, float]) -> None:
        accelerator = self.learner.accelerator
        written = self.due(self.config.logging_steps) or self.step == self.total_steps
        messages: list[str] = []
        if written:  # counts go on until they are
            warnings = self.warnings.take()
            metrics |= self.rewards.stats() | {"rewards/workers_replaced": float(self.rewards.replaced())}
            metrics["warnings"] = float(len(warnings))
            messages = [message for some in self.learner.gather(warnings) for message in some]
        metrics = self.learner.over_processes(metrics | {"peak_memory_gib": self.learner.peak_memory_gib()})
        metrics |= {"epoch": self.feed.epoch, **self.learner.hours(time.monotonic() - self.started)}
        self.view.end_step(self.step, metrics)
        if accelerator.is_main_process and written:
            self.folder.log_metrics(self.step, metrics, messages)
            accelerator.log(metrics, step=self.step)
        if self.config.log_completions:
            everyone = self.learner.gather([group_record(self.step, group) for group in groups])
            if accelerator.is_main_process:
                records = [record for part in everyone for record in part]
                self.folder.log_completions(records)
                if written:
                    show_table(accelerator, "completions", [row for r in records for row in table_rows(r)], self.step)
        self.timeline.flush()

    def save(self) -> None:
        from igrpo.learner.dealing import collected

        self.view.stage("checkpoint")
        # Each process has as many, and gets its own again where there are as many processes.
        begun = [record for part in zip(*collected(self.rollout.state_dict()), strict=True) for record in part]
        sampler = self.feed.state_dict([record["row"] for record in begun])
        state = {"step": self.step, "sampler": sampler, "drafts": begun}
        self.engine.sleep()  # weights are gathered one by one, for which it may have left no room
        saved = self.folder.save_checkpoint(self.step, lambda path: self.learner.save(path, self.tokenizer, state))
        self.view.say(f"saved {saved}")

    def report(self, before: dict[str, float], after: dict[str, float]) -> None:
        if before and after:
            self.view.say(
                f"bare-prompt accuracy: {before['eval/accuracy']:.1%} before, {after['eval/accuracy']:.1%} after "
                f"({len(self.held_out)} held-out problems)"
            )
        saved = checkpoints(self.folder.path)
        last = saved[-1] if saved else self.config.resume_from_checkpoint  # resumed elsewhere with no step to go
        self.view.say(f"igrpo report {self.folder.path} shows metrics and completions; the trained model is {last}")
        if saved and self.learner.accelerator.is_main_process:
            write_card(self.config, self.folder.path, saved[-1], len(self.held_out))
            if self.config.push_to_hub:
                self.view.say(f"uploaded to {upload(self.config, saved[-1])}")
        elif not saved and self.config.push_to_hub:
            self.view.say(f"nothing was trained nor uploaded: {upload_command(self.config, last)} does it")


@contextmanager
def build(config: TrainConfig) -> Iterator[TrainingRun]:
    """Everything a run needs, taken down again at the end.

    Raises:
        ConfigError: a setting that cannot work; nothing has been written.
    """
    with ExitStack() as stack:
        stack.enter_context(claimed(config, main_process=place()[0] == 0))
        resume_from = find_checkpoint(config)
        # Before anything heavy: the workers' memory is forked from nothing, and a wrong name is told at once.
        rewards = stack.enter_context(start_rewards(config))
        check_hub(config)
        placed = _placed(config)
        problems, held_out = load_data(config)
        check_columns(rewards.functions, [*problems, *held_out], config.has_environment)
        if (environment := start_environment(config)) is not None:
            stack.enter_context(environment)
            problems, held_out = environment.observed(problems), environment.observed(held_out)
        tokenizer, prompts, path, stop_ids = _load_prompts(config, environment.schemas if environment else ())
        problems, held_out, length = _fit_context(config, prompts, problems, held_out, path)
        _plan_memory(config, path, length)
        from igrpo.engines import start_engine
        from igrpo.engines.sync import WeightSync
        from igrpo.learner.learner import Learner, seed_everything
        from igrpo.learner.placements import launched
        from igrpo.models.loading import attention, load_policy
        from igrpo.rollout.rollout import Rollout
        from igrpo.rollout.turns import turns_of
        from igrpo.run.progress import LiveView
        from igrpo.run.timeline import Timeline

        seed_everything(config.seed)
        divide = launched(place()[1]).divider(config)
        load = partial(load_policy, path, config, attention(config), divide)
        reference = load() if config.has_reference else None
        learner = Learner(load(), reference, config, tokenizer.pad_token_id, length)
        total_steps = steps_of(config, len(problems), learner.accelerator.num_processes)
        learner.set_schedule(total_steps * config.num_iterations)
        adapter = learner.adapters.described(config.use_vllm) if config.sends_adapter else None
        seed, kept = config.seed + learner.accelerator.process_index, config.replays_sampling
        engine = start_engine(path, placed, length, stop_ids, seed, kept, adapter, config.router_replay, config.top_k)
        stack.callback(engine.close)
        if resume_from:
            engine.sleep()
        state = learner.load(resume_from) if resume_from else None
        sync = WeightSync(engine, learner, prompts.parts(problems[0]).bare, config)
        sync.prove(state["step"] if state else 0)
        feed = _feed(config, problems, learner, state)
        folder = RunFolder(config, state["step"] if state else None, learner.accelerator)
        timeline = Timeline(folder.path / "timeline.jsonl" if learner.accelerator.is_main_process else None)
        stack.callback(timeline.flush)
        turns = turns_of(environment, prompts, rewards.functions)
        rollout = Rollout(engine, rewards, prompts, tokenizer, config, timeline, feed.rank, learner.gather, turns)
        if state:
            rollout.load_state_dict(state.get("drafts", []), feed.processes)
        run = TrainingRun(
            config=config, problems=problems, held_out=held_out, feed=feed, tokenizer=tokenizer, prompts=prompts,
            rewards=rewards, engine=engine, rollout=rollout, learner=learner, sync=sync, folder=folder,
            timeline=timeline, total_steps=total_steps, step=state["step"] if state else 0,
            view=LiveView(total_steps, state["step"] if state else 0, not learner.accelerator.is_main_process),
        )  # fmt: skip
        _announce(run)
        run.push_weights(run.step)
        stack.enter_context(tracked(learner.accelerator, config))
        yield run


def _placed(config: TrainConfig) -> TrainConfig:
    """The config with GPUs for the servers that are started; says which keys do nothing on this machine.

    Raises:
        ConfigError: the machine cannot do what is asked.
    """
    rank, processes = place()
    on_cpu = this_machine(config.use_cpu).device == "cpu"
    config.check_sampler(masks.why_not(config, config.top_k, on_cpu))
    config.check_replay(routes.why_not(config, on_cpu))
    say_unused(config, on_cpu, rank)
    kind = config.vllm_quantization if config.use_vllm else None
    kind = "other weights than load_in_4bit's" if config.rounds_base else kind and f"{kind} weights"
    if kind and not config.vllm_importance_sampling_correction and rank == 0:
        print(
            f"warning: the engine samples with {kind} and nothing corrects for it; "
            "vllm_importance_sampling_correction: true does",
            flush=True,
        )
    config = replace(config, vllm_enable_sleep_mode=config.engine_sleeps and not on_cpu)
    return beside_the_learner(config, visible_gpus(config.use_cpu), local_processes(), processes)


def _load_prompts(config: TrainConfig, schemas: Sequence[dict[str, Any]]) -> tuple[Any, Any, str, tuple[int, ...]]:
    from igrpo.learner.adapters import Adapters
    from igrpo.learner.experts import aux_coefficient
    from igrpo.learner.optimizer import check_settings
    from igrpo.learner.placements import launched
    from igrpo.learner.policy import loss_config
    from igrpo.models.four_bits import check_four_bits
    from igrpo.models.loading import load_tokenizer, model_config, resolve_model, skeleton, stop_token_ids, vocabulary
    from igrpo.models.routers import Routers
    from igrpo.rollout.prompts import PromptBuilder

    loss_config(config)  # refuses impossible combinations
    check_settings(config)
    path = resolve_model(config.model_name_or_path)
    tokenizer = load_tokenizer(path, config)
    settings, placement = model_config(path, config), launched(place()[1])
    aux_coefficient(settings, config)
    check_four_bits(settings, config, placement.divides and place()[1] > 1)
    if config.router_replay:
        Routers(skeleton(path, config))  # refuses a model without any
    prompts = PromptBuilder(tokenizer, config, vocab_size=vocabulary(path, config), schemas=schemas)
    if config.use_peft:
        adapters = Adapters(skeleton(path, config), config)  # refuses layers before any weight is loaded
        placement.check_adapters(adapters)
        if config.sends_adapter:
            adapters.described(config.use_vllm)
    return tokenizer, prompts, path, stop_token_ids(path, tokenizer, config)


def _fit_context(
    config: TrainConfig, prompts: Any, problems: Sequence[Problem], held_out: Sequence[Problem], path: str
) -> tuple[list[Problem], list[Problem], int]:
    """The problems and the held-out ones whose question fits the engine's context whole, and that context."""
    from igrpo.models.loading import context_limit

    parts, held_out_parts = ([prompts.parts(p) for p in some] for some in (problems, held_out))
    longest = max(prompts.longest_refinement(p) for p in [*parts, *held_out_parts])
    limit = context_limit(path, config)
    if config.vllm_max_model_length is not None and limit is not None and config.vllm_max_model_length > limit:
        raise ConfigError(f"vllm_max_model_length: the model was made for {limit} tokens; write {limit} or less")
    length = config.vllm_max_model_length or min(longest, limit or longest)
    prompts.max_model_length = length
    fitting = [p for p, part in zip(problems, parts, strict=True) if prompts.shortest_context(part) <= length]
    if not fitting:
        raise ConfigError(
            f"no question fits a context of {length} tokens beside max_completion_length = "
            f"{config.max_completion_length}; lower max_completion_length or raise vllm_max_model_length"
        )
    room = length - config.max_completion_length
    judged = [h for h, part in zip(held_out, held_out_parts, strict=True) if len(part.bare) <= room]
    for kind, all_of_them, kept in (("", problems, fitting), ("held-out ", held_out, judged)):
        if len(kept) < len(all_of_them):
            print(f"warning: {len(all_of_them) - len(kept)} of {len(all_of_them)} {kind}questions are too long for a "
                  f"context of {length} tokens and are left out", flush=True)  # fmt: skip
    return fitting, judged, length


def _feed(config: TrainConfig, problems: Sequence[Problem], learner: Any, state: Any) -> ProblemFeed:
    """The order of problems, continued from a checkpoint's ``state`` if there is one."""
    sampler = ProblemSampler(len(problems), config.seed, config.shuffle_dataset)
    accelerator = learner.accelerator
    feed = ProblemFeed(problems, sampler, config, accelerator.num_processes, accelerator.process_index, learner.gather)
    if state:
        try:
            feed.load_state_dict(state["sampler"])
        except (ValueError, KeyError, TypeError) as error:  # another run's order, or a file that holds none
            raise ConfigError(f"resume_from_checkpoint: {error}") from None
    return feed


def _plan_memory(config: TrainConfig, path: str, context: int) -> None:
    """Says what will live where, before any weight is loaded.

    Raises:
        ConfigError: it cannot fit.
    """
    from igrpo.learner.placements import launched
    from igrpo.plan.memory import GIB, memory_plan
    from igrpo.plan.models import loaded_shape

    rank, processes = place()
    sharded = launched(processes).divides and processes > 1
    try:
        shape = loaded_shape(path, config)
    except KeyError as error:
        if rank == 0:
            print(f"no memory plan: the model's config has no {error}", flush=True)
        return
    plan = memory_plan(shape, config, this_machine(config.use_cpu, processes), context=context, sharded=sharded)
    if rank == 0:
        print("\n".join(plan.lines()), flush=True)
    needed, there = f"{plan.certain / GIB:.1f} GiB", f"{plan.machine.memory / GIB:.1f} GiB"
    if not plan.fits:
        raise ConfigError(
            f"this run needs at least {needed} of memory per process and there are {there}: {plan.advice()}"
        )
    if plan.tight and rank == 0:
        print(f"warning: activations may not fit beside it in {there}; if they do not: {plan.advice()}", flush=True)


def _announce(run: TrainingRun) -> None:
    config = run.config
    stages = f"{config.num_drafts} drafts, then " if config.drafts_per_prompt else ""
    if run.folder.set_aside is not None:
        run.view.say(f"an earlier run was kept as {run.folder.set_aside}")
    if run.step:
        run.view.say(f"resuming after step {run.step}")
    device = run.learner.accelerator.device.type
    run.view.say(
        f"{'vLLM' if config.use_vllm else 'Hugging Face generate'} samples, the learner trains, both on {device}"
    )
    run.view.say(
        f"{config.algorithm} on {config.dataset_name}: {len(run.problems)} problems, {run.total_steps} steps of "
        f"{config.prompts_per_step * run.learner.accelerator.num_processes} problems, {stages}"
        f"{config.num_generations} completions each -> {run.folder.path}"
    )
