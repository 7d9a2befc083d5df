"""``python -m experiments.lab``: a small model of our own, trained from scratch, on a task made for the question.

A question is a string of digits. The model learns its answers from documents with mistakes, every other one with a
draft beside the question (``experiments/lab_tasks.py``). ``--task sorting`` makes the other laboratory.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.lab_tasks import Sorting, Table
from experiments.plan import FOLDER

RUNS = FOLDER.parent / "runs"
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
WORDS = ("<answer>", "</answer>", "#", *"0123456789")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    task: Table | Sorting = field(default_factory=Table)
    steps: int = 600
    batch: int = 32
    learning_rate: float = 3e-3
    hidden: int = 96
    layers: int = 2
    problems: int = 8000
    held_out: int = 500
    seed: int = 0


LABS = {"table": ("lab", Recipe()), "sorting": ("lab-sorting", Recipe(Sorting(), steps=1500, batch=64, layers=3))}
"""Folder under ``runs`` and recipe of each task."""


def document(task: Table | Sorting, rng: random.Random) -> tuple[str, str]:
    """Prompt and answer; every other prompt shows a draft."""
    prompt = question = task.ask(rng)
    draft = task.attempt(question, rng) if rng.random() < 0.5 else ""
    if draft:
        prompt += f"#<answer>{draft}</answer>"
    return prompt, f"<answer>{task.attempt(question, rng, draft)}</answer>"


def make_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIAL))
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[1], "additional_special_tokens": list(SPECIAL[2:])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(recipe: Recipe) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=recipe.hidden, intermediate_size=4 * recipe.hidden,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def learnt(documents: Sequence[tuple[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids and labels; no prompt is learnt."""
    prompts = tokenizer([f"<|user|>{prompt}<|assistant|>" for prompt, _ in documents])["input_ids"]
    answers = tokenizer([f"{answer}<|end|>" for _, answer in documents])["input_ids"]
    return [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def train(recipe: Recipe, folder: Path) -> None:
    """Supervised next-token training; writes model, tokenizer, ``train.jsonl`` and ``test.jsonl`` into ``folder``."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rng, tokenizer = random.Random(recipe.seed), make_tokenizer()
    documents = [document(recipe.task, rng) for _ in range(recipe.steps * recipe.batch)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch, seed=recipe.seed,
        learning_rate=recipe.learning_rate, lr_scheduler_type="cosine", warmup_steps=recipe.steps // 10,
        weight_decay=0.01, adam_beta2=0.98, max_grad_norm=1.0, use_cpu=True, save_strategy="no",
        report_to="none", logging_steps=50,
    )  # fmt: skip
    model = make_model(recipe)
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    Trainer(model, arguments, train_dataset=learnt(documents, tokenizer), data_collator=collate).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for split, count in (("train", recipe.problems), ("test", recipe.held_out)):
        questions = [recipe.task.ask(rng) for _ in range(count)]
        lines = [json.dumps({"prompt": question, "solution": recipe.task.solution(question)}) for question in questions]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chance(folder: Path, problems: int = 500) -> float:
    """How often the model is right from the bare prompt at temperature 1: the mean probability of the right answers,
    exactly, where so few are that sampling would not meet them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()][:problems]
    found = 0.0
    for row in learnt([(row["prompt"], f"<answer>{row['solution']}</answer>") for row in rows], tokenizer):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found += float(logps[torch.tensor(row["labels"][1:]) != -100].sum().exp())
    return found / len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.lab", description=__doc__)
    parser.add_argument("--task", choices=LABS, default="table")
    parser.add_argument("--output", type=Path, help="folder for the model and its problems (default: runs/lab…)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    args = parser.parse_args(argv)
    name, recipe = LABS[args.task]
    output = args.output or RUNS / name
    if (output / "config.json").exists():
        parser.error(f"{output}: a model is there, and runs may stand on it; remove it, or give another --output")
    train(replace(recipe, seed=args.seed), output)
    print(f"wrote {output}, right from the bare prompt once in {1 / chance(output):,.0f} answers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
