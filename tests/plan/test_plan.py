"""`igrpo plan`: the simulation against closed forms, the tables people read, and errors they can act on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import plan_paper, plan_scaling
from igrpo.config.train_config import TrainConfig
from igrpo.plan.calibrate import calibrate, predict, read_run
from igrpo.plan.command import main
from igrpo.plan.generation import EngineCost, Lengths, Sequence_, decode, generate
from igrpo.plan.hardware import DEVICES, GUESSED, Hardware, parse_hardware
from igrpo.plan.models import TABLE, find_shape, table_shape
from igrpo.plan.workload import Workload
from igrpo.settings import ConfigError
from igrpo.settings.yaml_text import dump_yaml
from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "openmath-nemotron-7b.yaml")
COST = EngineCost(
    weight_bytes=16e9, parameters=8e9, kv_bytes_per_token=1e5, bandwidth=1.6e12, decode_flops=2e14, prefill_flops=1e14,
    overhead=2e-3, slots=64,
)  # fmt: skip
SEVEN = "nvidia/OpenMath-Nemotron-7B"


def sequences(lengths, prefill=0.0, context=100):
    return [Sequence_("refinement", i, length, context, prefill) for i, length in enumerate(lengths)]


def test_equal_sequences_take_their_steps_and_nothing_else():
    """64 sequences of 96 tokens in 64 slots: 96 steps, with the context that grows by one token each."""
    by_hand = sum(10e-3 + 2e-3 + 1e5 * 64 * (100 + t + 0.5) / 1.6e12 for t in range(96))
    assert decode(sequences([96] * 64), COST, lambda s, now: ()) == pytest.approx(by_hand, rel=1e-3)
    # Twice as many than fit go in two waves; prompts are read at 2 FLOP per parameter and token.
    twice = decode(sequences([96] * 128, prefill=50.0), COST, lambda s, now: ())
    assert twice == pytest.approx(2 * by_hand + 128 * 50 * 2 * 8e9 / 1e14, rel=1e-3)


def test_streaming_is_never_slower_than_a_barrier_and_lag_leaves_refinements_alone():
    lengths = Lengths(question=150, mean=700, limit=4096)
    cost = replace(COST, slots=128)
    barrier, streaming, lag = (
        generate(name, 16, 4, 4, lengths, cost, trials=8) for name in ("barrier", "streaming", "lag 1")
    )
    grpo = generate("barrier", 16, 0, 8, lengths, cost, trials=8)
    assert grpo.drafts == 0.0 and streaming.total < barrier.total
    assert barrier.total / grpo.total > 1.2, "two waves in series cost more than one, as the paper found"
    assert lag.drafts == 0.0 and lag.refinements < 0.75 * barrier.total and lag.hidden >= 0.0


def test_lengths_are_those_of_a_run_where_there_is_one():
    rng = np.random.default_rng(0)
    drawn = Lengths(question=1, mean=500, limit=800).draw(rng, 400, 50)
    assert drawn.max() == 800 and drawn.min() >= 1
    assert Lengths(question=1, mean=500, limit=10**6).draw(rng, 4000, 50).mean() == pytest.approx(500, rel=0.05)
    seen = Lengths(question=1, mean=0, limit=9, observed_drafts=(3, 5), observed_refinements=(7,))
    assert set(seen.draw(rng, 50, 4).flat) == {3, 5} and set(seen.draw(rng, 5, 4, "refinement").flat) == {7}


def workload(**settings) -> Workload:
    config = TrainConfig(
        model_name_or_path=SEVEN, dataset_name="d", per_device_train_batch_size=16, gradient_accumulation_steps=8,
        token_budget=16_384, max_completion_length=4096, **settings,
    )  # fmt: skip
    hardware = Hardware(DEVICES["A100-80G"], 16, 8)
    return Workload(table_shape(SEVEN), config, hardware, Lengths(200, 700, 4096), prompts=128)


def test_learner_tokens_and_seconds_by_hand():
    work = workload(gradient_checkpointing=False)
    assert work.learner_tokens(0, 8) == 128 * (200 + 8 * 700)
    assert work.learner_tokens(4, 4) == 128 * (200 + 30 + 700 + 4 * 700)
    assert replace(work, config=replace(work.config, shared_prefix=False)).learner_tokens(4, 4) == 128 * 4 * 1630

    def tokens(**settings) -> float:
        return replace(work, config=replace(work.config, **settings)).learner_tokens(4, 4) / 128

    assert tokens(refinement_context="bare") == 200 + 4 * 700
    assert tokens(refinement_context="both") == 930 + 200 + 2 * 4 * 700
    assert tokens(train_on_drafts=True) == 930 + 200 + 2 * 4 * 700
    assert tokens(show_drafts=2) == 930 + 700 + 4 * 700
    flops = work.learner_tokens(4, 4) * 6 * work.shape.parameters
    seconds = work.learner_seconds(4, 4)
    assert 1.0 < seconds / (flops / (8 * 312e12 * 0.4)) < 1.1, "attention adds some"
    recomputing = replace(work, config=replace(work.config, gradient_checkpointing=True)).learner_seconds(4, 4)
    assert recomputing == pytest.approx(seconds * 4 / 3)

    def passes(shape=work.shape, **settings) -> float:  # of which an update is one
        return replace(work, shape=shape, config=replace(work.config, **settings)).learner_seconds(4, 4) / seconds

    assert passes(beta=0.1) == pytest.approx(4 / 3) and passes(num_iterations=2) == pytest.approx(2 + 1 / 3)
    unheld = {"bypass_mode": True, "vllm_importance_sampling_correction": False}
    assert passes(num_iterations=2, **unheld) == pytest.approx(2)
    bare = {"refinement_context": "bare"}
    taught = passes(**bare, distillation_weight=0.5, num_iterations=2, beta=0.1)
    assert taught / passes(**bare) == pytest.approx(2 + 4 / 3)
    taught = passes(**bare, distillation_weight=0.5, num_iterations=2, beta=0.1, teacher_model_kind="base")
    assert taught / passes(**bare) == pytest.approx(2 + 3 / 3)
    experts = replace(work.shape, experts=8)
    assert passes(experts) == pytest.approx(4 / 3) and passes(experts, router_aux_loss_coef=0.0) == pytest.approx(1)
    slow = replace(work.hardware.device, link=1e9, fabric=1e9)
    slowed = replace(work, hardware=replace(work.hardware, device=slow))
    assert slowed.learner_seconds(4, 4) > 10 * seconds
    # Twice the weights in bf16 and once the gradients, which the learner scatters in fp32 (placements/fsdp2.py).
    moved = slowed.learner_tokens(4, 4) / 8 / 16_384 * 8 * work.shape.parameters
    assert slowed.learner_seconds(4, 4) == pytest.approx(moved / (1e9 * work.rates.network))
    slowed = replace(slowed, config=replace(slowed.config, beta=0.1))
    assert slowed.learner_seconds(4, 4) == pytest.approx(moved * 10 / 8 / (1e9 * work.rates.network))


def test_an_adapter_that_travels_alone_is_a_small_push():
    whole, merged, alone = (
        workload(lora_sync=sync, use_peft=use_peft).sync_seconds()
        for use_peft, sync in ((False, "adapter"), (True, "merged"), (True, "adapter"))
    )
    assert whole == merged > alone > 0


def test_lagging_drafts_hide_behind_a_learner_of_its_own():
    apart = {s.name: s for s in workload().steps()}
    turns = {s.name: s for s in replace(workload(), hardware=Hardware(DEVICES["A100-80G"], 16)).steps()}
    assert apart["iGRPO lag 1"].drafts == 0.0 < turns["iGRPO lag 1"].drafts
    assert apart["iGRPO lag 1"].total < apart["iGRPO streaming"].total <= apart["iGRPO barrier"].total


def test_the_paper_table_is_predicted_as_well_as_the_docs_say():
    default, fitted = plan_paper.paper_rows()
    published = [plan_paper.PUBLISHED[row.name] for row in default]
    ratio = published[1]["hours"] / published[0]["hours"]
    assert default[1].hours / default[0].hours == pytest.approx(ratio, rel=0.05)
    assert fitted[0].hours == pytest.approx(published[0]["hours"], rel=1e-6), "fitted to this figure"
    assert fitted[1].hours == pytest.approx(published[1]["hours"], rel=0.1)
    assert all(
        row.memory == pytest.approx(real["memory"], rel=0.05) for row, real in zip(default, published, strict=True)
    )
    assert 0.4 < default[0].hours / published[0]["hours"] < 0.7, (
        "an optimistic guess, and docs/scaling.md says how much"
    )


def test_the_tables_of_the_scaling_page_are_up_to_date(tmp_path):
    page = ROOT / "docs" / "scaling.md"
    copy = tmp_path / "scaling.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert plan_scaling.main([str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        "run python -m experiments.plan_scaling"
    )
    assert "1,024" in page.read_text(encoding="utf-8") and set(plan_scaling.COUNTS) == {2**i for i in range(11)}


def test_a_page_without_markers_is_left_as_it_is(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing to fill in")
    assert plan_scaling.main([str(page)]) == 2
    assert "lacks `<!-- experiments.plan_scaling: paper -->`" in capsys.readouterr().err
    assert page.read_text() == "nothing to fill in"


def test_every_recipe_can_be_planned_without_the_hub(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    find_shape.cache_clear()
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        if recipe.stem == "nemotron-h-8b":  # Mamba layers: the planner counts attention alone, and refuses
            assert main([str(recipe), "--hardware", "8xH100"]) == 2
            continue
        assert main([str(recipe), "--hardware", "8xH100"]) == 0, recipe
        out = capsys.readouterr().out
        assert "memory plan" in out and "iGRPO lag 1" in out and "no run of this project on a GPU" in out
    find_shape.cache_clear()


def test_the_table_of_public_figures_adds_up_to_the_models_names():
    sizes = {"0.5B": 0.494, "1.5B": 1.54, "1.5B-untied": 1.78, "7B": 7.62, "14B": 14.77, "32B": 32.76, "135m": 0.1345}
    for name in json.loads(TABLE.read_text())["models"]:
        key = next(s for s in ("0.5B", "1.5B", "7B", "14B", "32B", "135m") if s in name)
        key = "1.5B-untied" if "Distill-Qwen-1.5B" in name else key
        assert table_shape(name).parameters / 1e9 == pytest.approx(sizes[key], rel=0.005), name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder as training leaves it, of a two-layer model."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        model_name_or_path=save_tiny(folder / "model"), dataset_name="d", num_drafts=2, num_generations=2,
        max_completion_length=20, per_device_train_batch_size=8,
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_yaml(config))
    records = [
        {"step": step, "rollout/seconds": 4.0, "sync/seconds": 1.0, "step_time": 15.0, "learner/sequences": 6.0,
         "learner/sequences_skipped": 2.0} for step in (1, 2, 3)
    ]  # fmt: skip
    records[0]["step_time"] = 99.0  # warms caches
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    group = {"step": 1, "row": 0, "prompt": "3+4?", "solution": "7",
             "drafts": [{"tokens": 10}, {"tokens": 12}], "refinements": [{"tokens": 6}, {"tokens": 8}]}  # fmt: skip
    (folder / "completions.jsonl").write_text(json.dumps(group) + "\n")
    return folder


def test_a_run_with_stages_beside_each_other_calibrates_nothing(run, tmp_path):
    shutil.copytree(run, lagging := tmp_path / "run")
    with (lagging / "config.yaml").open("a") as file:
        file.write("policy_lag: 1\n")
    with pytest.raises(ConfigError, match=r"calibrate: .*policy_lag: 1.*give a run with policy_lag: 0$"):
        read_run(str(lagging))


def test_calibration_reproduces_the_run_and_carries_over(run, capsys):
    measured = read_run(str(run))
    assert (measured.generation, measured.learner, measured.sync, measured.steps) == (4.0, 10.0, 1.0, 2)
    assert measured.trained_share == 0.75 and measured.lengths.observed_drafts == (10, 12)
    hardware = parse_hardware("cpu")
    rates = calibrate(measured, hardware)
    step = predict(measured, hardware, rates)
    assert step.drafts + step.refinements == pytest.approx(4.0) and step.learner == pytest.approx(10.0)
    assert step.total == pytest.approx(15.0) and predict(measured, hardware, GUESSED).total != pytest.approx(15.0)
    assert main([str(run / "config.yaml"), "--hardware", "cpu", "--calibrate", str(run), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps"][2]["learner"] == pytest.approx(10.0)
    assert "rates are those of" in planned["assumptions"][0]
    taught = ["--distillation_weight", "0.5", "--train_on_drafts", "true", "--json"]
    assert main([str(run / "config.yaml"), "--hardware", "cpu", *taught]) == 0
    assert "with a teacher for every completion; those without" in capsys.readouterr().out


def test_a_model_with_state_space_layers_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "ssm_state_size": 16}))
    assert main([RECIPE, "--hardware", "8xH100", "--model_name_or_path", str(tmp_path)]) == 2
    assert "has state-space layers (ssm_state_size)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([RECIPE, "--hardware", "16xA100-90G"], "did you mean A100-80G?"),
        ([RECIPE, "--hardware", "A100"], "did you mean A100-40G or A100-80G?"),
        ([RECIPE, "--hardware", "8xA100-80G", "--generation", "8"], "leave none to learn"),
        ([RECIPE, "--hardware", "8xH100", "--vllm_mode", "server"], "say on how many devices: --generation N"),
        ([RECIPE], "write igrpo plan RECIPE --hardware COUNTxDEVICE"),
        (["recipes/nothing.yaml", "--hardware", "cpu"], "there is no such file"),
        ([RECIPE, "--hardware", "cpu", "--model_name_or_path", "./nowhere"], "./nowhere has no config.json"),
        ([RECIPE, "--hardware", "cpu", "--model_name_or_path", "smollm3"], "there is no model smollm3; known"),
        ([RECIPE, "--hardware", "cpu", "--calibrate", "recipes"], "recipes has no config.yaml; give a run folder"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(error) == 1 and said in error[0]
