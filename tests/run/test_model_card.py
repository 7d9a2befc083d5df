"""The card of a run, and the way to a hub: a server that speaks what an upload asks of it."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from igrpo.config.recipe import build_config, parse_args
from igrpo.model_card import UploadError, _on_hub, check_hub, upload, write_card
from igrpo.settings import ConfigError
from igrpo.training_run import TrainingRun
from tests.support.training import ROOT, words

TOKEN = "hf_a-secret"


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.server.refuses is True:
            return self._answer({"error": "no"}, 403)
        answer = {"url": f"{self.server.url}/me/m", "repo_id": "me/m"}
        if self.path.startswith("/api/models/me/m/preupload/"):
            files = json.loads(body)["files"]
            apart = ".safetensors" if self.server.refuses == "weights" else ()
            modes = {one["path"]: "lfs" if one["path"].endswith(apart) else "regular" for one in files}
            answer = {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        if self.path.endswith("/info/lfs/objects/batch"):
            upload = {"actions": {"upload": {"href": f"{self.server.url}/weights"}}}
            answer = {"transfer": "basic", "objects": [one | upload for one in json.loads(body)["objects"]]}
        if self.path.startswith("/api/models/me/m/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/m/commit/{'0' * 40}"}
        self._answer(answer)

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"error": "full"}, 403)

    def do_GET(self):
        self._answer({"id": "me/m", "sha": "0" * 40, "siblings": []})

    def _answer(self, what, code=200):
        text = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.asked, server.files, server.refuses = f"http://127.0.0.1:{server.server_port}", [], {}, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


def test_a_run_writes_its_card_and_an_upload_that_fails_loses_nothing(model, questions, tmp_path, hub):
    (Path(model) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    folder, settings = tmp_path / "out", {"max_steps": 2, "save_steps": 1, "use_peft": True, "lora_dropout": 0.0}
    settings |= {"use_vllm": False, "eval_samples": 2, "hub_model_id": "me/m", "push_to_hub": True}
    arguments = words(model, questions, folder, **settings)
    environment = {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "igrpo.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    saved = folder / "checkpoint-2"
    assert f"error: push_to_hub: {saved} was not uploaded (" in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("nothing is lost: ")]
    words_of_it = shlex.split(said.removeprefix("nothing is lost: "))
    assert words_of_it[:5] == ["hf", "upload", "me/m", str(saved), "."] and "adapter/README.md" in words_of_it
    everything = [*folder.rglob("*.yaml"), *folder.rglob("*.jsonl"), *folder.rglob("*.md")]
    assert not any(TOKEN in text for text in (done.stdout, done.stderr, *(p.read_text() for p in everything)))

    card = ModelCard.load(saved / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model is card.data.datasets is None
    (result,) = card.data.eval_results
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
    assert result.metric_value == scores[-1] and len(scores) == 2 and result.dataset_type == "own"
    assert f"| 0 | {100 * scores[0]:.1f} % |" in card.text and f"| 2 | {100 * scores[1]:.1f} % |" in card.text
    assert "iterative GRPO" in card.text and "LoRA adapters of rank 16" in card.text
    assert "max_completion_length: 10" in card.text and str(tmp_path) not in str(card)
    assert not (folder / "checkpoint-1" / "README.md").exists()

    config, hub.refuses = parse_args(arguments), "weights"
    with pytest.raises(UploadError, match=r"not uploaded \(Error while uploading '.*safetensors' .*; .*403"):
        upload(config, saved)
    hub.refuses = False
    check_hub(config)
    assert upload(config, saved).endswith("/me/m")
    assert hub.files["README.md"] == (saved / "README.md").read_bytes()
    kept = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert set(hub.files) == {p for p in kept if not p.startswith(("state/", "igrpo-", "adapter/README"))}
    assert {"model.safetensors", "config.json", "adapter/adapter_model.safetensors"} <= set(hub.files)
    here = (str(tmp_path).encode(), str(Path(model).parent).encode())
    assert not [name for name, content in hub.files.items() if any(one in content for one in here)]
    assert json.loads(hub.files["adapter/adapter_config.json"])["base_model_name_or_path"] == Path(model).name
    assert {token for _, token in hub.asked} == {f"Bearer {TOKEN}"}


def test_a_card_of_a_run_without_evaluation_or_steps_is_one_too(model, tmp_path):
    funcs, prompt = [f"{tmp_path}/mine.py:score", "accuracy"], "/think. ~ {{ name }} " + "of it at length, " * 300
    config = build_config({
        "model_name_or_path": model, "dataset_name": "o/d", "algorithm": "grpo", "output_dir": "r",
        "reward_funcs": funcs, "system_prompt": prompt, "vllm_engine_args": {"download_dir": f"{tmp_path}/weights/"},
    })  # fmt: skip
    card = write_card(config, tmp_path, tmp_path, 0)
    said = yaml.safe_load(card.text.partition("```yaml")[2].partition("```")[0])
    assert said["reward_funcs"] == ["mine.py:score", "accuracy"] and said["system_prompt"] == prompt
    assert said["vllm_engine_args"] == {"download_dir": "weights"} and str(tmp_path) not in str(card)
    assert "None: no problems were held out" in card.text and card.data.datasets == ["o/d"]


def test_a_card_of_a_resumed_run_whose_base_has_a_broken_one(model, tmp_path):
    (Path(model) / "README.md").write_text("---\nlicense: [mit\n---\n# Base\n")
    judged = {"step": 3, "eval/accuracy": 0.5, "eval/reward": 1.0}
    log = [
        {"step": 1, "reward": 0.1, "core_hours": 1.0, "draft/accuracy": 0.5},
        {"step": 2, "reward": 0.2, "core_hours": 2.0, "draft/accuracy": 0.6},
        {"step": 3, "reward": 0.3, "core_hours": 0.5, "kl": None}, judged, judged | {"eval/accuracy": 0.25},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in log))
    config = build_config({"model_name_or_path": model, "dataset_name": "reasoning_gym:x", "eval_samples": 300})
    text = write_card(config, tmp_path, tmp_path, 7).text
    for line in ("| core_hours | 1 | 2.5 |", "| draft/accuracy | 0.5 | 0.6 |", "7 held-out problems", "| 3 | 25.0 %"):
        assert line in text
    assert text.count("| 3 | ") == 1 and "That of the base model" in text
    names = ("smollm2-135m", model, f"{tmp_path}/metrics.jsonl", "./d", "reasoning_gym:x", "o/d", "gsm8k")
    assert [name for name in names if _on_hub(name)] == ["o/d", "gsm8k"]


def test_a_finished_checkpoint_resumed_elsewhere_is_not_uploaded_and_that_is_said(tmp_path):
    said = []
    settings = {"push_to_hub": True, "hub_model_id": "me/m", "resume_from_checkpoint": "a/checkpoint-2"}
    config = build_config({"model_name_or_path": "m", "dataset_name": "d"} | settings)
    folder, view = SimpleNamespace(path=tmp_path), SimpleNamespace(say=said.append)
    TrainingRun.report(SimpleNamespace(config=config, folder=folder, view=view), {}, {})
    assert said[-1].startswith("nothing was trained nor uploaded: hf upload me/m a/checkpoint-2 . ")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hub_model_id": "a/b/c"}, "hub_model_id: .*write OWNER/NAME"),
        ({"hub_model_id": "me/m"}, "push_to_hub: no token was found; export HF_TOKEN"),
    ],
)
def test_an_upload_that_could_not_succeed_is_refused_before_the_run(settings, sentence, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    common = {"model_name_or_path": "m", "dataset_name": "d", "push_to_hub": True}
    with pytest.raises(ConfigError, match=sentence):
        check_hub(build_config(common | settings))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_hub(build_config(common | {"hub_model_id": "me/m"}))
    with pytest.raises(ConfigError, match="hub_token: settings are logged; export HF_TOKEN") as refused:
        build_config(common | {"hub_token": TOKEN})
    assert TOKEN not in str(refused.value)
