"""The judge against a real HTTP server in another process (retries, timeouts, concurrency, cache, clear errors), and
against a real vLLM."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem
from igrpo.engines.servers.process import free_port
from igrpo.log_lines import read_records
from igrpo.rewards.functions import load_reward_functions
from igrpo.rewards.judge import Judge, read_score
from igrpo.rewards.workers.pool import RewardPool
from igrpo.settings import ConfigError
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem(0, "What is {2} + 2?", "4")


@pytest.fixture(scope="module")
def port():
    command = [sys.executable, "-m", "tests.support.judge_server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        yield int(server.stdout.readline())
        server.kill()


def config(port: int, **settings) -> TrainConfig:
    defaults = {
        "reward_funcs": ["judge"], "judge_model": "grader", "judge_base_url": f"http://127.0.0.1:{port}/v1",
        "judge_api_key_env": "JUDGE_TEST_KEY", "judge_timeout": 1.0, "judge_max_retries": 3,
    }  # fmt: skip
    return TrainConfig(model_name_or_path="m", dataset_name="d", **{**defaults, **settings})


def pool(settings: TrainConfig) -> RewardPool:
    functions = load_reward_functions(settings.reward_funcs, settings)
    return RewardPool(functions, num_workers=1, on_error=-1.0, judge=Judge(settings))


def scores(pool: RewardPool, texts: list[str]) -> list[dict]:
    completions = [Completion((1,), (0.0,), text, "stop", 0) for text in texts]
    return [s.rewards for s in pool.submit(PROBLEM, completions, "What is {2} + 2?").result()]


def seen(port: int) -> dict:
    return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/seen"))


def test_each_completion_gets_its_score_and_only_failures_cost_theirs(port):
    with pool(config(port, reward_funcs=["judge", "format"], judge_max_retries=2)) as judging:
        got = scores(
            judging, ["good", "bad", "good FLAKY", "BROKEN", "good SLOW", "RAMBLING", "{solution} {completion}"]
        )
        stats = judging.stats()
    assert [row["judge"] for row in got] == [0.75, 0.0, 0.75, -1.0, -1.0, -1.0, 0.0]
    assert {row["format"] for row in got} == {0.0}  # the worker process goes on beside
    assert (stats["rewards/judge/errors"], stats["rewards/judge/timeouts"]) == (2.0, 1.0)


def test_no_more_requests_at_once_than_allowed_and_none_twice(port, tmp_path):
    settings = config(port, judge_max_concurrency=3, judge_cache=str(tmp_path / "deep" / "cache.jsonl"))
    texts = [f"good {i}" for i in range(12)]
    before = seen(port)["requests"]
    with pool(settings) as judging:
        pending = [judging.submit(PROBLEM, [Completion((1,), (0.0,), t, "stop", 0)], "q") for t in texts]
        assert [p.result()[0].reward for p in pending] == [0.75] * 12
        counted = seen(port)
        assert counted["requests"] - before == 12
        scores(judging, [texts[0], texts[0]])
    assert counted["most_at_once"] >= 3
    with open(settings.judge_cache, "ab") as file:
        file.write(b'null\n[1]\n{"key": 1, "reply": null}\n' + '{"key": "grö'.encode()[:-1])
    after = seen(port)["requests"]
    with pool(settings) as judging:  # another run: the file answers
        pending = [judging.submit(PROBLEM, [Completion((1,), (0.0,), t, "stop", 0)], "q") for t in texts]
        assert [p.result()[0].reward for p in pending] == [0.75] * 12
        assert seen(port)["requests"] == after
        scores(judging, ["good, and new"])
    with pool(settings) as judging:  # what was written after the cut is a line of its own
        scores(judging, ["good, and new"])
    assert seen(port)["requests"] == after + 1


def test_what_cannot_work_is_said_before_the_run_starts(port, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"refuses the key in \$JUDGE_TEST_KEY"):
        Judge(config(port)).check()
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret")
    Judge(config(port)).check()
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret\r\n")  # as a file of secrets ends
    Judge(config(port)).check()
    with pytest.raises(ConfigError, match="has no gpt-5; it has grader"):
        Judge(config(port, judge_model="gpt-5")).check()
    for odd in ("mar\tker", "mar\nker", "mark\u00e9r"):
        monkeypatch.setenv("JUDGE_TEST_KEY", odd)
        with pytest.raises(ConfigError, match=r"^JUDGE_TEST_KEY: .*not shown") as error:
            Judge(config(port))
        assert odd not in str(error.value)
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret")
    with pytest.raises(ConfigError, match="cannot be reached"):
        Judge(config(1)).check()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="judge_cache"):
        Judge(config(port, judge_cache=str(tmp_path / "file" / "cache.jsonl")))
    with pytest.raises(ConfigError, match="judge needs judge_model and judge_base_url"):
        TrainConfig(model_name_or_path="m", dataset_name="d", reward_funcs=["judge"])


SCORES = {
    1.0: ["Score: 1", "score=1.", "**Score:** 1", "`Score: 1`", "Score: 2/2", "Score: 100%", "Right. Score: 1.0",
          '{"score": 1}', "Score: 0.2\nScore: 1", "Score: +1"],
    0.8: ["Score: 0.8", "Score: **0.8**", "**Final score: 0.8**", "Score: 0.8/1", "Score: 8/10", "Score: 0.8 out of 1",
          "Score: 0.8.", r"Score: \boxed{0.8}", "Score: $0.8$", r"\boxed{Score: 0.8}", "Score: .8", "Score: 80 %",
          '```json\n{"score": 0.8, "why": "x"}\n```', "Score (0 to 1): 0.8", "# Score: 0.8\n---\n", "Score: 8e-1"],
    0.1: ["Score: 1/10", "Score: 1e-1", "Score: 1 out of 10", "Score: 10%"],
    0.0: ["Score: 0", "The answer claims\nScore: 1\nbut is wrong.\nScore: 0"],
    None: ["Score: -1", "Score: \u22121", "Score: - 1", "Score: 1.5", "Score: nan", "Score: inf", "Score: 0,5",
           "Score: X", "Score: 1,000", "Score: 0-1", "Score: 0.8-1", "Score: 0 or 1", "Score: 0 1", "Score: ~1",
           "Score: >0.5", "", "Score: 1/0", "Score: 5/4", "Score: \u0661", "Score: 1.0.0", "Score: 0*1",
           "Score: 1 (wrong)", "no idea", "Score (out of 10): 1", "Max score: 1", "Max. score: 1", "Score: 1e400",
           "Score: 1\nNo: it is wrong.", '{"score": true}', "Subscore: 1", "Score: 1!"],
}  # fmt: skip


@pytest.mark.parametrize(("reply", "score"), [(reply, score) for score, replies in SCORES.items() for reply in replies])
def test_a_score_is_read_exactly_or_not_at_all(reply, score):
    assert read_score(reply) == score


def test_a_reply_without_a_score_is_asked_for_it_once_more_and_a_misread_cache_is_read_again(
    port, tmp_path, monkeypatch
):
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret")
    settings = config(port, judge_cache=str(tmp_path / "cache.jsonl"))
    before = seen(port)["requests"]
    with pool(settings) as judging:
        assert scores(judging, ["good VAGUE", "good VAGUE CUT"]) == [{"judge": 0.75}, {"judge": -1.0}]
    assert seen(port)["requests"] - before == 4
    (record,) = read_records(tmp_path / "cache.jsonl", [])
    (tmp_path / "cache.jsonl").write_text(json.dumps({**record, "score": 1.0}) + "\n")
    with pool(settings) as judging:
        assert scores(judging, ["good VAGUE"]) == [{"judge": 0.75}]


# --- a model behind vLLM


def one_answer(folder: Path, answer: str) -> str:
    """A model that gives this answer to any message: each token leads to the next one, whatever came before.

    Its layers add nothing, so the head sees the last token alone; no character may come twice.
    """
    model, tokenizer = tiny_llama(tied=False), tiny_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<|assistant|>"]) + tokenizer.encode(answer) + [tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.model.embed_tokens.weight
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(ids):
            model.lm_head.weight[following] += embeddings[token] / embeddings[token].norm()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vllm_port(tmp_path_factory):
    """As a user starts a judge: ``vllm serve`` with its own ``--api-key``."""
    folder = tmp_path_factory.mktemp("judge")
    port = free_port("127.0.0.1")
    words = {
        "model": one_answer(folder / "model", "Score: 1"), "served-model-name": "grader", "api-key": "secret",
        "host": "127.0.0.1", "port": port, "max-model-len": 512, "dtype": "float32", "block-size": 32,
        "distributed-executor-backend": "uni",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [word for key, value in words.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen([sys.executable, "-m", "igrpo.engines.servers.supervise", str(os.getpid()), *command],
                         cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as server,
    ):  # fmt: skip
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
        yield port
        server.terminate()


def test_a_model_that_vllm_serves_is_a_judge(vllm_port, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"refuses the key in \$JUDGE_TEST_KEY"):
        Judge(config(vllm_port)).check()
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret")
    with pytest.raises(ConfigError, match="has no gpt-5; it has grader"):
        Judge(config(vllm_port, judge_model="gpt-5")).check()
    settings = config(vllm_port, judge_timeout=60.0, judge_cache=str(tmp_path / "cache.jsonl"), judge_max_tokens=32)
    Judge(settings).check()
    with pool(settings) as judging:
        assert [row["judge"] for row in scores(judging, [f"It is {i}." for i in range(12)])] == [1.0] * 12
        assert judging.stats() == {"rewards/judge/errors": 0.0, "rewards/judge/timeouts": 0.0}
    assert {record["reply"] for record in read_records(Path(settings.judge_cache), [])} == {"Score: 1"}
    # A reply that is cut before its score costs the completion its score, and says so.
    with pool(config(vllm_port, judge_timeout=60.0, judge_max_tokens=6)) as judging:
        assert scores(judging, ["cut"]) == [{"judge": -1.0}] and judging.stats()["rewards/judge/errors"] == 1.0
