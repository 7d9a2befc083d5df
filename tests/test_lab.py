"""The small model's documents are drawn as their docstring says, and what its recipe writes can be trained on."""

from __future__ import annotations

import math
import random

import pytest
import yaml
from transformers import AutoTokenizer

from experiments.lab import LABS, Recipe, document, learnt, make_tokenizer, train
from experiments.lab import main as lab_main
from experiments.lab_tasks import Sorting, Table, in_place
from experiments.plan import FOLDER
from igrpo.data.sources import load_problems
from igrpo.rollout.config import PromptsConfig
from igrpo.rollout.prompts import PromptBuilder
from igrpo.train import main


def test_a_draft_adds_evidence_to_the_models_own():
    task, rng = Table(), random.Random(0)
    own, copied = math.exp(task.own), math.exp(task.copied)
    seen = {"alone": [0, 0], "beside the right one": [0, 0], "beside a wrong one": [0, 0]}
    for _ in range(400):
        question = task.ask(rng)
        draft = task.attempt(question, rng)
        for made, shown in ((draft, ""), (task.attempt(question, rng, draft), draft)):
            for place, right in enumerate(task.solution(question)):
                name = "alone" if not shown else f"beside {'the right' if shown[place] == right else 'a wrong'} one"
                seen[name][0] += made[place] == right
                seen[name][1] += 1
    shares = [right / count for right, count in seen.values()]
    expected = [own / (own + 9), own * copied / (own * copied + 9), own / (own + copied + 8)]
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(shares, expected, strict=True))


def test_a_draft_is_work_done():
    """Two answers one upon the other sort as far as both their passes together."""
    rng, two, one = random.Random(0), Sorting(passes=(0, 0, 1), slip=0), Sorting(passes=(0, 1), slip=0)
    assert Sorting(slip=1).attempt("3847120956", rng) == "3847120956"
    for _ in range(50):
        question = one.ask(rng)
        draft = one.attempt(question, rng)
        assert one.attempt(question, rng, draft) == two.attempt(question, rng)
        assert Sorting(passes=(0,) * 9 + (1,), slip=0).attempt(question, rng) == one.solution(question)
    assert one.attempt("210", rng) == "102"


def test_partial_credit_is_for_digits_in_their_place():
    texts = ["<answer>0123</answer>", "<answer>0132</answer>", "<answer>012</answer>", "0123", "<answer></answer>"]
    assert in_place(texts, ["0123"] * 5) == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert in_place([[{"role": "assistant", "content": "<answer>0123</answer>"}]], ["0123"]) == [1.0]


@pytest.mark.parametrize("name", LABS)
def test_documents_are_learnt_behind_their_prompt(name):
    task, rng, tokenizer = LABS[name][1].task, random.Random(0), make_tokenizer()
    documents = [document(task, rng) for _ in range(50)]
    assert 10 < sum("#" in prompt for prompt, _ in documents) < 40
    for row, (prompt, answer) in zip(learnt(documents, tokenizer), documents, strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"<|user|>{prompt}<|assistant|>{answer}<|end|>"
        labels = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(labels) == f"{answer}<|end|>" and row["labels"][-len(labels) :] == labels


def test_the_recipe_writes_a_folder_that_trains(tmp_path):
    folder = tmp_path / "lab"
    train(Recipe(steps=2, batch=4, hidden=32, problems=20, held_out=4), folder)
    with pytest.raises(SystemExit, match="2"):
        lab_main(["--output", str(folder)])  # runs may stand on what is there
    (problem, *_) = load_problems(str(folder), dataset_split="test")
    assert problem.solution == Table().solution(problem.prompt) and len(problem.prompt) == Table.digits
    base = yaml.safe_load((FOLDER / "base-lab.yaml").read_text())
    del base["prompts_per_step"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = PromptBuilder(tokenizer, PromptsConfig(system_prompt=None, draft_template=base["draft_template"]))
    shown, _ = prompts.with_draft(prompts.parts(problem), tokenizer.encode("<answer>1234</answer><|end|>"))
    assert tokenizer.decode(shown) == f"<|user|>{problem.prompt}#<answer>1234</answer><|assistant|>"
    base |= {"model_name_or_path": str(folder), "dataset_name": str(folder), "output_dir": str(tmp_path / "run")}
    base |= {"max_steps": 1, "per_device_train_batch_size": 8, "eval_samples": 4, "num_generations": 4}
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(base))
    assert main(["--config", str(tmp_path / "lab.yaml")]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
