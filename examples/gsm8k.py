"""iGRPO on GSM8K from Python: a configuration, a reward of one's own, `train`.

    python examples/gsm8k.py --dataset_name train.jsonl          # any key of the configuration can follow
    python examples/gsm8k.py --dataset_name openai/gsm8k --dataset_config main

The same from a recipe: `igrpo train --config recipes/gsm8k.yaml`.
"""

import sys
from pathlib import Path

from igrpo.config.recipe import parse_args
from igrpo.settings import ConfigError
from igrpo.train import train

DEFAULTS = [
    "--model_name_or_path", "smollm2-135m", "--dataset_prompt_column", "question",
    "--dataset_solution_column", "answer", "--algorithm", "igrpo", "--num_drafts", "4", "--num_generations", "4",
    "--max_completion_length", "256", "--reward_funcs", f"[accuracy, {Path(__file__).stem}:brief]",
    "--reward_weights", "[1.0, 0.1]", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4",
    "--output_dir", "runs/gsm8k",
]  # fmt: skip


def brief(completions: list, **_: object) -> list[float]:
    """1 for an empty answer, 0 from 1,000 characters on. Runs in a process of its own, under a deadline."""
    return [max(0.0, 1.0 - len(completion[-1]["content"]) / 1000) for completion in completions]


def main(argv: list[str]) -> int:
    try:
        return train(parse_args([*DEFAULTS, *argv]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
