"""Pages that are written from the source are up to date; pairs of blocks agree; tables name keys that exist."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from igrpo.config.recipe import DROPPED, RENAMED
from igrpo.config.train_config import TrainConfig
from igrpo.settings.section import field_types
from tests.support.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_generated_pages_are_up_to_date():
    command = [sys.executable, "scripts/write_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run make docs"


def test_the_api_page_has_every_public_name_and_every_argument():
    import inspect

    import igrpo_kernels

    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in igrpo_kernels.__all__:
        assert f"## {name}\n" in text
        public = getattr(igrpo_kernels, name)
        if inspect.isfunction(public):
            for argument in inspect.signature(public).parameters:
                assert re.search(rf"\b{argument}\b.*", text.split(f"## {name}\n")[1].split("\n## ")[0]), (
                    name,
                    argument,
                )


def pairs(page: str) -> list[tuple[str, str, str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for section in text.split("\n## ")[1:]:
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(blocks) in (0, 2), section.splitlines()[0]
        if blocks:
            found.append((section.splitlines()[0], *blocks))
    return found


PAIRS = pairs("drop-in.md")


@pytest.mark.parametrize("pair", PAIRS, ids=[title for title, *_ in PAIRS])
def test_the_second_block_does_what_the_first_does(pair):
    title, before, after = pair
    if "liger_kernel" in before:
        pytest.importorskip("liger_kernel")
    results = []
    for block in (before, after):
        model = copy.deepcopy(tiny_llama())
        names = run(block, model)
        scalar = names["loss"] if "loss" in names else (names["logps"] * names["w"] + names["entropy"]).sum()
        scalar.backward()
        results.append((names, [p.grad for p in model.parameters()]))
    (old, old_grads), (new, new_grads) = results
    common = {n for n in ("loss", "logps", "entropy") if n in old and n in new}
    assert common
    for name in common:
        torch.testing.assert_close(new[name], old[name], rtol=1e-5, atol=1e-5, msg=f"{title}: {name}")
    assert max(float(grad.abs().max()) for grad in old_grads) > 1e-4
    for mine, other in zip(new_grads, old_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5 * float(other.abs().max()) + 1e-9)


def run(block: str, model: torch.nn.Module) -> dict:
    g = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 280, (3, 12), generator=g)
    mask = torch.ones(3, 6)
    mask[1, 4:] = 0
    names = {
        "torch": torch, "model": model, "input_ids": input_ids, "completion_ids": input_ids[:, -6:], "T": 6,
        "temperature": 0.7, "mask": mask, "advantages": torch.tensor([1.0, -1.0, 0.5]), "num_items": 40.0,
        "old_logps": 0.3 * torch.randn(3, 6, generator=g) - 5.6, "w": torch.randn(3, 6, generator=g),
    }  # fmt: skip
    exec(block, names)
    return names


def test_migration_tables_lead_to_keys_that_exist():
    rows = 0
    for line in (DOCS / "migration.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        _, ours, note = (cell.strip() for cell in line.strip("|").split(" | ", 2))
        named = re.findall(r"`([^`]+)`", ours)
        assert named or (ours == "—" and note.strip(" |")), line
        for key in [*named, *re.findall(r"`(vllm_\w+|num_drafts|max_\w+)`", note)]:
            assert key in field_types(TrainConfig), line
        rows += 1
    assert rows > 80


def test_the_trl_table_speaks_of_keys_that_are_accepted():
    table = (DOCS / "migration.md").read_text(encoding="utf-8").split("## TRL")[1].split("\n## ")[0]
    accepted = field_types(TrainConfig).keys() | DROPPED.keys() | RENAMED.keys() | {"RLOOTrainer"}
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows
    for line in rows:
        for key in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            assert key in accepted, line


def test_the_schedules_table_is_the_record():
    """docs/scheduler.md against benchmarks/results/schedules/cpu.json."""
    arms = json.loads((ROOT / "benchmarks/results/schedules/cpu.json").read_text())["arms"]
    page = (ROOT / "docs/scheduler.md").read_text()
    shown = [line for line in page.splitlines() if re.match(r"\| (GRPO, G|two stages)", line)]
    grpo = median(arms["grpo"]["step"])
    assert len(shown) == len(arms) == 6
    for line, arm in zip(shown, arms.values(), strict=True):
        whole, rollout, learner = (median(arm[part]) for part in ("step", "rollout", "learner"))
        spread = f"{min(arm['step']):.2f}–{max(arm['step']):.2f}"
        expected = [f"{whole:.2f}", spread, f"{rollout:.2f}", f"{learner:.2f}", f"{whole / grpo:.2f}"]
        assert [cell.strip(" *") for cell in line.split("|")[2:-1]] == expected


def test_the_index_leads_to_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= linked


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
