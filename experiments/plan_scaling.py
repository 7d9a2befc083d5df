"""``python -m experiments.plan_scaling`` writes the tables of docs/scaling.md: the paper's recipe from 1 to 1,024 GPUs,
worked out by ``igrpo plan``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import plan_paper
from experiments.plan import FOLDER
from igrpo.config.train_config import TrainConfig
from igrpo.plan.generation import Lengths
from igrpo.plan.hardware import DEVICES, Hardware
from igrpo.plan.models import table_shape
from igrpo.plan.workload import Workload
from igrpo.settings import ConfigError
from igrpo.terminal import print_error

PAGE = FOLDER.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- experiments.plan_scaling: {name} -->", "<!-- end -->"
COUNTS = tuple(2**i for i in range(11))
MODELS = {"1.5B": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "7B": "nvidia/OpenMath-Nemotron-7B"}
LENGTHS = Lengths(question=200, mean=700, limit=4096)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.plan_scaling", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    page = parser.parse_args(argv).page
    try:
        write(page)
    except ConfigError as error:
        print_error(error)
        return 2
    print(f"wrote {len(tables())} tables into {page}")
    return 0


def write(page: Path) -> None:
    """Replaces the text between the page's markers.

    Raises:
        ConfigError: the page lacks a marker.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for name, lines in tables().items():
        begin = BEGIN.format(name=name)
        head, mark, rest = text.partition(begin)
        _, closed, tail = rest.partition(END)
        if not mark or not closed:
            raise ConfigError(f"scaling: {page} lacks `{begin}` and `{END}` around the table to write")
        text = f"{head}{begin}\n" + "\n".join(lines) + f"\n{END}{tail}"
    page.write_text(text, encoding="utf-8")


def tables() -> dict[str, list[str]]:
    return {
        "paper": plan_paper.lines(),
        "same batch, 7B": scaled("7B", "A100-80G", lambda count: 128),
        "growing batch, 7B": scaled("7B", "H100-80G", lambda count: 32 * count),
        "growing batch, 1.5B": scaled("1.5B", "A100-80G", lambda count: 32 * count),
    }


def scaled(size: str, device: str, prompts: Callable[[int], int]) -> list[str]:
    """One row per number of GPUs, in the layout with the shortest step under lag 1 that fits; efficiency is completions
    per second and GPU against the first such row."""
    lines = [
        "| GPUs | learn + generate | prompts | GB per learner | GRPO s | barrier s | streaming s | lag 1 s | "
        "completions/s | efficiency |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = None
    for count in COUNTS:
        layouts = sorted({count * part // 4 for part in range(4)})
        works = [_workload(size, Hardware(DEVICES[device], count, layout), prompts(count)) for layout in layouts]
        fitting = [work for work in works if not work.memory().tight]
        if not fitting:
            least = min(work.memory().total for work in works) / 1e9
            lines.append(f"| {count:,} | | | {least:.0f}, does not fit | | | | | | |")
            continue
        work = min(fitting, key=lambda work: work.step("iGRPO", "lag 1", 4, 4).total)
        who = f"{work.hardware.learners} + {work.hardware.generation}" if work.hardware.generation else "in turns"
        steps = work.steps()
        rate = steps[-1].completions / steps[-1].total
        first = first or rate / count
        seconds = " | ".join(f"{step.total:.0f}" if step.total >= 10 else f"{step.total:.1f}" for step in steps)
        lines.append(
            f"| {count:,} | {who} | {work.prompts:,} | {work.memory().total / 1e9:.0f} | {seconds} | {rate:.1f} | "
            f"{rate / count / first:.0%} |"
        )
    return lines


def _workload(size: str, hardware: Hardware, prompts: int) -> Workload:
    config = TrainConfig(
        model_name_or_path=MODELS[size], dataset_name="MATH", num_drafts=4, num_generations=4,
        per_device_train_batch_size=16, gradient_accumulation_steps=8, max_completion_length=4096, token_budget=16_384,
        vllm_max_num_seqs=256, draft_policy_lag=1,
    )  # fmt: skip
    return Workload(table_shape(MODELS[size]), config, hardware, LENGTHS, prompts=prompts)


if __name__ == "__main__":
    sys.exit(main())
