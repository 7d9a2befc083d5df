"""The README's "replace this with that" gives the same loss and the same gradient."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch

from tests.support.tiny import tiny_llama

README = Path(__file__).resolve().parents[1] / "README.md"


def run(block: str, model) -> dict:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 280, (3, 12), generator=generator)
    mask = torch.ones(3, 6)
    mask[1, 4:] = 0
    names = {
        "torch": torch, "model": model, "input_ids": input_ids, "completion_ids": input_ids[:, -6:], "T": 6,
        "temperature": 0.7, "mask": mask, "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "old_logps": 0.3 * torch.randn(3, 6, generator=generator) - 5.6,
    }  # fmt: skip
    exec(block, names)
    return names


def test_the_two_blocks_of_the_readme_agree():
    old, new = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    before, after = tiny_llama(), copy.deepcopy(tiny_llama())
    loss = run(old, before)["loss"]
    loss.backward()
    out = run(new, after)["out"]
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()), msg=name)
