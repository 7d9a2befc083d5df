"""A tiny model whose vocabulary has whole calls, so that it calls tools though it is random."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken

from tests.support.environments import CALLS
from tests.support.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HOSTILE = {
    "environment_factory": "tests.support.environments:Hostile",
    "reward_funcs": "[environment, tests.support.environments:totals]",
}
"""Whose tools it calls."""


def save_caller(folder: Path, calls: list[str] = CALLS, seed: int = 0) -> str:
    """A random model that mostly calls; returns the folder as text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in calls])
    tokenizer.chat_template = TEMPLATE
    model, likely = tiny_llama(seed, vocab_size=len(tokenizer), tied=False), [1, *range(261, len(tokenizer))]
    with torch.no_grad():
        head = model.lm_head.weight
        head[[i for i in range(len(head)) if i not in likely]] *= 0.5
        head[likely] *= 2.5
        head[1] *= 1.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
