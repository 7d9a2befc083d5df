"""``igrpo eval``: samples n answers per problem, scores them, and says avg@n and pass@k with intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo.config.recipe import build_config, coerce, read_yaml, split_args
from igrpo.eval.config import EvalConfig
from igrpo.eval.evaluated import EvaluatedModel, find_model
from igrpo.run.output_folder import DiskFullError, disk_is_full, refused, usable
from igrpo.settings import EXIT_BAD_CONFIG, EXIT_DISK_FULL, EXIT_ENGINE, EXIT_INTERRUPTED, EXIT_REWARD, ConfigError
from igrpo.settings.kinds import Mark
from igrpo.settings.section import field_marks
from igrpo.terminal import print_error, printable, quiet_libraries, shown_warnings

if TYPE_CHECKING:
    from igrpo.eval.benchmarks import Benchmark

# Heavy imports are inside functions: a mistake in the arguments is answered at once.

BOXED_PROMPT = r"Think step by step, then put the final answer inside \boxed{}."
"""System prompt of a model that comes without a run."""
DEFAULT_LENGTH = 4096
EXAMPLES = """\
examples:
  igrpo eval --model runs/quickstart --benchmarks held_out --n 8
  igrpo eval --model Qwen/Qwen2.5-1.5B-Instruct --benchmarks aime24,amc23,math500 --n 64 --temperature 0.6 --top_p 0.95
  igrpo eval --model smollm2-135m --benchmarks gsm8k,mine.jsonl@4 --data_dir data --max_samples 50 --two_stage
  igrpo eval --model runs/a/checkpoint-12 runs/b --benchmarks gsm8k --output_dir runs/compare

Any key of `igrpo train` that concerns prompts or the engine can follow: --system_prompt, --use_vllm false,
--bf16 false, --vllm_max_num_seqs 64. The same command again continues an evaluation that was stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a setting that cannot work, 3 the engine failed, 4 no room on the disk, 5 a reward function
    failed on everything, 130 stopped by Ctrl-C."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        with shown_warnings():
            return evaluate_all(arguments, rest)
    except ConfigError as error:
        print_error(error)
        return EXIT_BAD_CONFIG
    except (DiskFullError, OSError) as error:
        if not isinstance(error, DiskFullError) and not disk_is_full(error, Path(arguments.output_dir)):
            raise
        print_error(f"{error}; finished problems are kept, and the same command goes on")
        return EXIT_DISK_FULL
    except KeyboardInterrupt:
        print("\nstopped; finished problems are kept, and the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igrpo eval", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="MODEL", help="run, checkpoint, folder, hub id or smollm2-135m")
    names = "aime24, aime25, amc23, math500, minerva_math, gsm8k, held_out, a .jsonl file, reasoning_gym:TASK"
    add("--benchmarks", nargs="+", required=True, metavar="NAME[@n]", help=names)
    add("--n", type=_positive, default=8, help="completions per problem (default 8; NAME@n for one benchmark)")
    add("--temperature", type=float, default=0.6, help="0 is greedy; default 0.6")
    add("--top_p", type=float, default=0.95, help="default 0.95")
    rules = "also refine drafts: first, majority (the default), oracle (uses the reference answer)"
    add("--two_stage", nargs="?", const="majority", metavar="RULE,…", help=rules)
    add("--data_dir", help="folder with NAME/test.jsonl or NAME.jsonl instead of the hub")
    add("--max_samples", type=_positive, help="only the first rows of each benchmark")
    add("--seed", type=int, default=42, help="of the sampling and of the bootstrap; default 42")
    add("--output_dir", default="runs/eval", help="a folder per model, summary.json, the plot; default runs/eval")
    add("--config", help="a recipe to take prompts and engine settings from")
    return parser


def evaluate_all(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    quiet_libraries()
    _, overrides = split_args(list(rest))
    recipe = read_yaml(arguments.config) if arguments.config else {}
    with refused(arguments.output_dir):
        folder = usable(arguments.output_dir)
    rules = _rules(arguments.two_stage)
    asked = [name for word in arguments.benchmarks for name in word.split(",") if name]
    # Every mistake in names and files is found before the first model is loaded.
    plans = []
    for name in [name for word in arguments.model for name in word.split(",") if name]:
        model = find_model(name)
        config = _config(model, recipe, overrides, arguments, bool(rules))
        plans.append((model, config, _benchmarks(asked, arguments, model, overrides)))
    from igrpo.engines import EngineError
    from igrpo.eval import summary
    from igrpo.eval.run import EvaluationRun
    from igrpo.report.benchmarks import write_pass_at_k
    from igrpo.rewards.workers.tally import RewardError

    rows: list[dict[str, Any]] = []
    try:
        for model, config, benchmarks in plans:
            with ExitStack() as stack:
                run = EvaluationRun(model, config, benchmarks, rules, folder, stack)
                rows += run.rows()
    except (EngineError, RewardError) as error:
        print_error(f"{error}; finished problems are kept, and the same command goes on", lines=True)
        return EXIT_ENGINE if isinstance(error, EngineError) else EXIT_REWARD
    rows = summary.merge(folder, rows)
    text = f"{summary.table(rows)}\n\n{summary.pass_table(rows)}\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")
    write_pass_at_k(rows, folder)
    shown = printable(text, len(text), lines=True)
    print(f"\n{shown}\nper cent, 95 % bootstrap intervals over problems; everything is in {folder}", flush=True)
    return 0


def _config(
    model: EvaluatedModel,
    recipe: dict[str, Any],
    overrides: dict[str, Any],
    arguments: argparse.Namespace,
    drafts: bool,
) -> EvalConfig:
    """The run's settings, the recipe's over them, the command line's over both; a ``Mark`` keeps a key out of them."""
    own = {
        "model_name_or_path": model.path,
        "algorithm": "igrpo" if drafts else "grpo",
        "draft_selection": "best",  # by the rule of --two_stage
        "show_drafts": 1,
        "eval_temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    if taken := [key for key in overrides if key in own]:
        raise ConfigError(f"{taken[0]}: `igrpo eval` sets this itself; see --help")
    if overrides.get("reward_weights") is not None and "reward_funcs" not in overrides:
        raise ConfigError("reward_weights: write reward_funcs beside it; each benchmark has functions of its own")
    run = asdict(model.run_config) if model.run_config else {}
    values: dict[str, Any] = {"system_prompt": BOXED_PROMPT, "max_completion_length": DEFAULT_LENGTH}
    for key, marks in field_marks(EvalConfig).items():
        if key in run and Mark.NOT_FROM_A_RUN not in marks and Mark.ONLY_IF_ASKED not in marks:
            values[key] = run[key]
        if key in recipe and Mark.ONLY_IF_ASKED not in marks:
            values[key] = recipe[key]
        elif key in recipe:
            print(f"warning: {key} is not taken from a recipe; write --{key}", file=sys.stderr)
        if key in ("environment_factory", "tools") and run.get(key) and not (key in recipe or key in overrides):
            print(
                f"warning: the run had {key}: {run[key]}, which is not taken from its folder; write --{key}, or its "
                "model is evaluated without",
                file=sys.stderr,
            )
    return build_config({**values, **overrides, **own}, EvalConfig)


def _benchmarks(
    asked: Sequence[str], arguments: argparse.Namespace, model: EvaluatedModel, overrides: dict[str, Any]
) -> list[Benchmark]:
    from igrpo.eval.benchmarks import load_benchmark

    found = [
        load_benchmark(name, arguments.n, arguments.data_dir, arguments.max_samples, model.run_config) for name in asked
    ]
    names = [benchmark.name for benchmark in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"benchmarks: {twice[0]} is given twice; rename one of the files")
    if "reward_funcs" in overrides:
        functions = tuple(coerce("reward_funcs", overrides["reward_funcs"]))
        found = [replace(benchmark, reward_funcs=functions, reward_weights=None) for benchmark in found]
    if overrides.get("reward_weights") is not None:
        weights = tuple(coerce("reward_weights", overrides["reward_weights"]))
        found = [replace(benchmark, reward_weights=weights) for benchmark in found]
    return found


def _rules(text: str | None) -> list[str]:
    from igrpo.eval.two_stage import RULES

    rules = [rule for rule in (text or "").split(",") if rule]
    if strangers := [rule for rule in rules if rule not in RULES]:
        raise ConfigError(f"two_stage: there is no rule '{strangers[0]}'; write some of {', '.join(RULES)}")
    return rules


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; write 1 or more")
    return value
