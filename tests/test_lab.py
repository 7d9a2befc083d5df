"""The small model's documents are drawn as their docstring says, and what its recipe writes can be trained on."""

from __future__ import annotations

import math
import random

import pytest
import yaml
from transformers import AutoTokenizer

from experiments.lab import DIGITS, Recipe, ask, attempt, document, learnt, make_tokenizer, solution, train
from experiments.lab import main as lab_main
from experiments.plan import FOLDER
from igrpo.data.sources import load_problems
from igrpo.rollout.config import PromptsConfig
from igrpo.rollout.prompts import PromptBuilder
from igrpo.train import main


def test_a_draft_adds_evidence_to_the_models_own():
    recipe, rng = Recipe(), random.Random(0)
    own, copied = math.exp(recipe.own), math.exp(recipe.copied)
    seen = {"alone": [0, 0], "beside the right one": [0, 0], "beside a wrong one": [0, 0]}
    for _ in range(400):
        question = ask(rng)
        draft = attempt(question, recipe, rng)
        for made, shown in ((draft, ""), (attempt(question, recipe, rng, draft), draft)):
            for place, right in enumerate(solution(question)):
                name = "alone" if not shown else f"beside {'the right' if shown[place] == right else 'a wrong'} one"
                seen[name][0] += made[place] == right
                seen[name][1] += 1
    shares = [right / count for right, count in seen.values()]
    expected = [own / (own + 9), own * copied / (own * copied + 9), own / (own + copied + 8)]
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(shares, expected, strict=True))


def test_documents_are_learnt_behind_their_prompt():
    recipe, rng, tokenizer = Recipe(), random.Random(0), make_tokenizer()
    documents = [document(recipe, rng) for _ in range(50)]
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
    assert problem.solution == solution(problem.prompt) and len(problem.prompt) == DIGITS
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
