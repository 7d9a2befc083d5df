"""Every file in examples/ does what its first lines say, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.tiny import save_tiny, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
TESTED = set()


def load(name: str) -> ModuleType:
    TESTED.add(name)
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_the_plain_loop_is_short_and_learns(folder):
    """A random model cannot add; what it can learn in a few steps is to write digits at all (reward 0.1)."""
    example = load("plain_loop")
    source = (ROOT / "examples" / "plain_loop.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    imported = {line for line in source.splitlines() if line.startswith(("import", "from"))}
    assert not any("igrpo." in line or "igrpo_kernels." in line for line in imported)
    log = example.main(["--model", folder, "--steps", "25", "--learning_rate", "3e-3", "--max_new_tokens", "8"])
    first, last = (sum(x["refinement"] for x in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.02, (first, last)
    assert log[-1]["entropy"] < log[0]["entropy"]


@pytest.mark.parametrize("trainer", ["fused", "igrpo"])
@pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")
def test_trl_drop_in(folder, trainer, tmp_path):
    pytest.importorskip("trl")
    log = load("trl_drop_in").main(
        ["--model", folder, "--trainer", trainer, "--max_steps", "2", "--max_completion_length", "6",
         "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert len(log) == 2 and all(step["entropy"] > 0 for step in log)
    assert ("draft/reward" in log[0]) == (trainer == "igrpo")


def test_gsm8k(folder, tmp_path):
    """GSM8K's row format, the example's own reward in its own process; Hugging Face's generation for speed."""
    TESTED.add("gsm8k")
    data = tmp_path / "train.jsonl"
    rows = [
        {"question": f"Ann has {i} pens and buys 2. How many?", "answer": f"{i}+2={i + 2}\n#### {i + 2}"}
        for i in range(8)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["--dataset_name", str(data), "--model_name_or_path", folder, "--output_dir", str(tmp_path / "run"),
             "--use_vllm", "false", "--use_cpu", "--bf16", "false", "--max_steps", "1", "--max_completion_length", "8",
             "--gradient_accumulation_steps", "1", "--system_prompt", "null"]  # fmt: skip
    command = [sys.executable, "examples/gsm8k.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][:1]
    assert 0.9 < step["rewards/brief/mean"] <= 1.0 and step["draft/reward"] > 0


def test_openrlhf_actor_step():
    model, ids = tiny_llama(), torch.randint(5, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    mask, advantages = torch.ones(2, 5), torch.tensor([[1.0], [-0.5]]).expand(2, 5)
    logps = (model(ids).logits[:, -6:-1] / 0.8).log_softmax(-1).gather(-1, ids[:, -5:, None])[..., 0]
    old = logps.detach() + 0.4 * torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    loss = load("openrlhf_policy_loss").actor_step(model, ids, mask, old, advantages, temperature=0.8)
    ratio = (logps - old).exp()
    wanted = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    torch.testing.assert_close(loss, wanted.detach())
    assert float(model.lm_head.weight.grad.abs().max()) > 0


def test_open_instruct_loss_of_packed_rows():
    model, g = tiny_llama(), torch.Generator().manual_seed(0)
    ids = torch.randint(5, 280, (2, 12), generator=g)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * 2)
    masks = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]] * 2)
    advantages = torch.randn(2, 12, generator=g)
    logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[:, :-1] / 0.7
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    old = logps.detach() + 0.4 * torch.randn(2, 11, generator=g)
    ratio, a = (logps - old).exp(), advantages[:, 1:]
    wanted = (torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.3)) * masks[:, 1:]).sum() / 20
    out = load("open_instruct_loss").loss_of_packed_rows(
        model, ids, torch.ones_like(ids), positions, masks, old, advantages, clip_lower=0.2, clip_higher=0.3,
        temperature=0.7, tokens_in_step=20.0,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, wanted, rtol=1e-5, atol=1e-6)
    leaves = list(model.parameters())
    for mine, other in zip(*(torch.autograd.grad(x, leaves) for x in (out.loss, wanted)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-8)


def test_prime_rl_settings_name_a_function_and_keys_that_exist():
    from igrpo_kernels import GRPOLossConfig

    loss = tomllib.loads((ROOT / "examples" / "prime_rl.toml").read_text(encoding="utf-8"))["trainer"]["loss"]
    module, _, function = loss["import_path"].rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))
    GRPOLossConfig(**loss["kwargs"])


@pytest.mark.needs_package("verl")
def test_verl_registers_its_loss():
    core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    load("verl_policy_loss")
    assert "igrpo_cispo" in core.POLICY_LOSS_REGISTRY
