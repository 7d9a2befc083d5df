"""``igrpo plan``: memory, seconds per stage and GPU-hours of a recipe, GRPO and iGRPO side by side."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from igrpo.config.recipe import build_config, read_yaml, split_args
from igrpo.plan import fake_gpu_library
from igrpo.plan.hardware import DEVICES, GUESSED, parse_hardware
from igrpo.settings import EXIT_BAD_CONFIG, ConfigError
from igrpo.terminal import print_error

MEAN_LENGTH = 700
EXAMPLES = """\
examples:
  igrpo plan recipes/openmath-nemotron-7b.yaml --hardware 16xA100-80G
  igrpo plan recipes/openmath-nemotron-7b.yaml --hardware 16xA100-80G --generation 8 --mean_length 1100
  igrpo plan recipes/openmath-nemotron-7b.yaml --hardware 8xA100-80G --rehearse
  igrpo plan recipes/quickstart.yaml --hardware cpu --calibrate runs/quickstart

Any key of `igrpo train` can follow (--num_drafts 8, --token_budget 16384). Devices: """
UNPROVEN = (
    "GPU figures are predictions from data sheets and the shares below; no run of this project on a GPU has checked "
    "them yet"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a setting that cannot work."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        plan(arguments, rest)
    except ConfigError as error:
        print_error(error)
        return EXIT_BAD_CONFIG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igrpo plan", description=__doc__, epilog=EXAMPLES + ", ".join(DEVICES), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("recipe", nargs="?", help="the recipe's YAML file")
    add("--hardware", help="COUNTxDEVICE, as 16xA100-80G")
    add("--generation", type=int, default=0, help="devices that only generate; 0: all do both in turns")
    add("--calibrate", metavar="RUN", help="take rates and lengths from a run measured on this hardware")
    add("--question_tokens", type=int, help="prompt tokens before the draft; default 200")
    add("--mean_length", type=float, help=f"mean completion length; default {MEAN_LENGTH}, or a third of the limit")
    add("--problems", type=int, help="training problems, for the GPU-hours of the whole run")
    add(
        "--rehearse",
        action="store_true",
        help="take two learner steps on GPUs that are not there: memory by line, host "
        "waits, collectives; needs a C++ compiler once",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def plan(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from igrpo.plan.calibrate import calibrate, predict, read_run
    from igrpo.plan.generation import Lengths
    from igrpo.plan.models import known_rows, run_shape
    from igrpo.plan.workload import Workload

    if arguments.rehearse:
        fake_gpu_library.load()  # before anything imports torch
    if not arguments.recipe or not arguments.hardware:
        raise ConfigError("write igrpo plan RECIPE --hardware COUNTxDEVICE; igrpo plan --help has examples")
    config = build_config({**read_yaml(arguments.recipe), **split_args(list(rest))[1]})
    config = replace(config, algorithm="igrpo")  # GRPO stands beside it at the same budget
    hardware = parse_hardware(arguments.hardware, arguments.generation)
    if config.uses_servers and not hardware.generation:
        raise ConfigError(
            f"generation: {arguments.recipe} samples from servers; say on how many devices: --generation N"
        )
    if config.use_vllm and hardware.device.kind == "cuda" and not hardware.generation:
        config.check_in_process()
    shape, source = run_shape(config)
    mean = arguments.mean_length or min(MEAN_LENGTH, config.max_completion_length / 3)
    lengths = Lengths(arguments.question_tokens or 200, mean, config.max_completion_length)
    rates, share, notes = GUESSED, 1.0, []
    if arguments.calibrate:
        measured = read_run(arguments.calibrate)
        rates, share = calibrate(measured, hardware), measured.trained_share
        lengths = measured.lengths
        before = predict(measured, hardware, GUESSED)
        notes.append(
            f"rates are those of {arguments.calibrate} ({measured.steps} steps, {measured.config.algorithm}): its "
            f"{measured.total:.1f} s per step were predicted as {before.total:.1f} s from peaks alone, a factor of "
            f"{rates.generation_scale:.2g} in generation, {rates.learner_scale:.2g} in the learner and "
            f"{rates.sync_scale:.2g} in the push; lengths and the share of trained groups ({share:.0%}) are its own"
        )
    work = Workload(shape, config, hardware, lengths, rates, trained_share=share)
    if arguments.rehearse:
        print("\n".join(rehearsed(work, arguments.recipe)))
        return
    steps = work.steps()
    rows = arguments.problems or known_rows(config.dataset_name)
    count = _count_steps(config, rows, work.prompts_per_step)
    notes += assumptions(work, source, rows, calibrated=bool(arguments.calibrate))
    memory = work.memory()
    if arguments.json:
        items = {item.name: item.bytes for item in memory.items}
        print(json.dumps({"memory": items, "memory_of": memory.machine.memory, "steps": [asdict(s) for s in steps],
                          "training_steps": count, "assumptions": notes}, indent=2))  # fmt: skip
        return
    met = f", {shape.active_parameters / 1e9:.2f} B of them per token" if shape.experts else ""
    size = f"{shape.parameters / 1e9:.2f} B parameters{met}"
    print(f"{arguments.recipe} on {hardware.count} x {hardware.device.name}: {size}\n")
    print("\n".join(memory.lines()))
    if memory.tight:
        print(f"  does not fit by this estimate: {memory.advice()}")
    print("\n" + "\n".join(table(steps, hardware.count, count)))
    print("\nassumptions:\n" + "\n".join(f"  - {note}" for note in notes))


def rehearsed(work: Any, recipe: str) -> list[str]:
    """The rehearsal's report, and what the memory plan says of the same."""
    from transformers import AutoConfig

    from igrpo.plan.memory import GIB
    from igrpo.plan.models import find_config
    from igrpo.plan.rehearsal import rehearse

    hardware, config = work.hardware, work.config
    if hardware.device.kind != "cuda":
        raise ConfigError("rehearse: only GPUs are rehearsed; name one of them with --hardware, as 8xA100-80G")
    sizes, source = find_config(config.model_name_or_path)
    if sizes.get("model_type") is None:
        raise ConfigError(f"rehearse: {source} names no model_type")
    report = rehearse(
        AutoConfig.for_model(**sizes), work.placed, hardware.learners, int(hardware.device.memory),
        prompt=int(work.prefix(config.num_drafts)), completion=int(work.lengths.mean), context=work.context(),
    )  # fmt: skip
    planned = work.memory().learner
    difference = f"{planned / report.peak - 1:+.0%} against the rehearsal"
    head = f"{recipe}, {config.model_name_or_path} ({source}): the learner's steps on fake {hardware.device.name}s"
    return [head, *report.lines(), "", f"igrpo plan says {planned / GIB:.2f} GiB of the learner, {difference}"]


def _count_steps(config: Any, rows: int | None, prompts: int) -> int | None:
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * rows / prompts) if rows else None


def table(steps: Sequence[Any], devices: int, count: int | None) -> list[str]:
    """Seconds per step by stage, one column per scheduler; then what it costs."""
    lines = [f"  {'seconds per step':<22}" + "".join(f"{step.name:>18}" for step in steps)]
    for stage in ("drafts", "refinements", "learner", "sync", "total"):
        lines.append(f"  {stage:<22}" + "".join(f"{getattr(step, stage):>18.1f}" for step in steps))
    first = steps[0].total
    lines.append(f"  {'against GRPO':<22}" + "".join(f"{step.total / first:>17.2f}x" for step in steps))
    lines.append(f"  {'completions per s':<22}" + "".join(f"{s.completions / s.total:>18.2f}" for s in steps))
    lines.append(f"  {'learner tokens':<22}" + "".join(f"{step.learner_tokens:>18,.0f}" for step in steps))
    many = count or 1000
    label = f"device-hours, {many} steps"
    lines.append(f"  {label:<22}" + "".join(f"{many * s.total * devices / 3600:>18.1f}" for s in steps))
    return lines


def assumptions(work: Any, source: str, rows: int | None, calibrated: bool) -> list[str]:
    lengths, rates, hardware, device = work.lengths, work.rates, work.hardware, work.hardware.device
    who = (
        f"{hardware.learners} learn, {hardware.generation} generate" if hardware.generation else "all do both in turns"
    )
    seen = bool(lengths.observed_refinements)
    spread = "as measured" if seen else f"log-normal, mean {lengths.mean:.0f}, cut at {lengths.limit}"
    said = [
        f"sizes of the model: {source}",
        f"{work.prompts_per_step} prompts per step on {hardware.count} x {device.name}, {who}; GRPO gets {work.budget} "
        f"completions per prompt, iGRPO {work.config.num_drafts} drafts + {work.config.num_generations} refinements",
        f"questions of {lengths.question} tokens; completion lengths {spread}",
        f"peaks per device: {device.flops / 1e12:g} TFLOP/s, {device.bandwidth / 1e12:.3g} TB/s, "
        f"{device.link / 1e9:g} GB/s in a node, {device.fabric / 1e9:g} GB/s between nodes",
        f"reached: {rates.bandwidth:.0%} of the bandwidth decoding, {rates.learner:.0%} of the FLOP/s learning, "
        f"{rates.network:.0%} of the network; {rates.decode_overhead * 1e3:g} ms per decode step",
        "the learner packs tokens" + (" and computes a group's prompt once" if work.config.shared_prefix else ""),
        "rewards and tokenisation are hidden behind decoding; the slowest engine counts",
    ]
    if work.shape.experts and work.config.router_aux_loss_coef != 0:
        said.append("with a forward pass more that balances experts, as if the model's config weighs that")
    if work.config.distillation_weight:
        said.append("with a teacher for every completion; those without a right draft to see have none")
    if device.kind == "cuda" and work.placed.engine_sleeps:
        awake = replace(work, config=replace(work.config, vllm_enable_sleep_mode=False))
        total = awake.memory().total / 2**30
        said.append(f"the engine sleeps while the learner works, except under lag 1, which takes {total:.1f} GiB")
    if rows is None and work.config.max_steps < 1:
        said.append("the data set's size is not known here: --problems N gives the hours of the whole run")
    if not calibrated or device.kind != "cpu":
        said.append(UNPROVEN if device.kind != "cpu" else "an uncalibrated CPU is a guess: use --calibrate RUN")
    return said
