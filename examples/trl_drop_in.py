"""TRL's GRPO script with one class exchanged: `FusedGRPOTrainer` for the loss, `IGRPOTrainer` for two stages.

python examples/trl_drop_in.py --model HuggingFaceTB/SmolLM2-135M-Instruct --trainer igrpo
accelerate launch examples/trl_drop_in.py --trainer fused
"""

import argparse
import re

from datasets import Dataset
from trl import GRPOConfig

from igrpo.integrations.trl import IGRPOTrainer
from igrpo_kernels.integrations.trl import FusedGRPOTrainer


def right_number(completions: list, solution: list[int], **_: object) -> list[float]:
    """TRL's reward contract: completions and the data set's columns in, one number each out."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = [re.findall(r"-?\d+", text) for text in texts]
    return [float(bool(numbers) and int(numbers[-1]) == s) for numbers, s in zip(found, solution, strict=True)]


def sums(count: int) -> Dataset:
    pairs = [(i % 10, 7 * i % 10) for i in range(count)]
    questions = [f"What is {a} + {b}? Answer with the number." for a, b in pairs]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return Dataset.from_dict({"prompt": prompts, "solution": [a + b for a, b in pairs]})


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--trainer", choices=("fused", "igrpo"), default="igrpo")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--max_completion_length", type=int, default=24)
    parser.add_argument("--output_dir", default="runs/trl_drop_in")
    args = parser.parse_args(argv)
    config = GRPOConfig(
        output_dir=args.output_dir, max_steps=args.max_steps, max_completion_length=args.max_completion_length,
        per_device_train_batch_size=8, num_generations=4, loss_type="grpo", temperature=0.7, bf16=False,
        logging_steps=1, save_strategy="no", report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    if args.trainer == "igrpo":
        trainer = IGRPOTrainer(args.model, right_number, config, sums(200), num_drafts=4)
    else:
        trainer = FusedGRPOTrainer(args.model, right_number, config, sums(200))
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main()
