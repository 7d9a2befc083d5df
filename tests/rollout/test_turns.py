"""Completions of several turns: calls are read, tools run, their answers are appended, the policy's own is trained."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import reasoning_gym
import trl
from transformers import AutoTokenizer

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem, Scored, Trajectory, written
from igrpo.engines import start_engine
from igrpo.environments.calls import MOST_CALLS, ToolCall, calls_in, read_calls
from igrpo.environments.setup import Environment, start_environment
from igrpo.environments.template import ToolTemplate
from igrpo.eval.sampling import evaluate
from igrpo.learner.batching import training_samples
from igrpo.rewards.columns import check_columns
from igrpo.rewards.setup import start_rewards
from igrpo.rollout.metrics import rollout_metrics
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.rollout import Rollout, _plain, _scored
from igrpo.rollout.turns import turns_of
from igrpo.settings import ConfigError
from tests.support import environments as there
from tests.support.callers import save_caller
from tests.support.tiny import tiny_tokenizer

HERE = "tests.support.environments:"
SCHEMA = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
PROBLEMS = [Problem(i, f"{i}+1?", str(i + 1), {"level": i}) for i in range(4)]


def config(path: str = "m", **settings) -> TrainConfig:
    options = {
        "use_cpu": True, "bf16": False, "system_prompt": None, "draft_template": " [{draft}]", "temperature": 1.0,
        "num_drafts": 2, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 120,
        "full_determinism": True, "tool_timeout": 0.7, "gradient_checkpointing": False, **settings,
    }  # fmt: skip
    return TrainConfig(model_name_or_path=path, dataset_name="d", **options)


# --- what the policy wrote

ONE = there.call("add", '{"n": 1}')
DEEP = there.call("add", '{"n": ' + "[" * 10**5 + "]" * 10**5 + "}")


CASES = [
    ("no call", [], ""),
    (f"<think>{ONE}</think>7", [], ""),  # what it only thought of
    (f"{ONE} and {ONE}", ["add", "add"], ""),
    (there.call("add", '"{\\"n\\": 1}"'), ["add"], ""),  # arguments as text
    ('<tool_call>{"name": "add"}</tool_call>', ["add"], ""),
    ("<tool_call>", ["unknown"], "no </tool_call>"),
    ("<tool_call>{}</tool_call>", ["unknown"], "a call is"),
    ("<tool_call>[1]</tool_call>", ["unknown"], "a call is"),
    ("<tool_call>{,}</tool_call>", ["unknown"], "no JSON"),
    (there.call("add", "[]"), ["add"], "must be an object"),
    (there.call("add", '"x"'), ["unknown"], "no JSON"),
    (there.call("add", '{"n": ' + "9" * 5000 + "}"), ["unknown"], "no JSON"),
    (there.call("add", '{"n": ' + "[" * 50 + "]" * 50 + "}"), ["add"], "nested"),
    (DEEP, None, "nested"),
    ("<tool_call>" * 10**5, ["unknown"], "no </tool_call>"),
    (ONE * 10**4, ["add"] * (MOST_CALLS + 1), ""),
]


@pytest.mark.parametrize("text, names, wrong", CASES)
def test_calls_are_read_in_linear_time_whatever_stands_there(text, names, wrong):
    start = time.perf_counter()
    found = calls_in(text)
    assert time.perf_counter() - start < 1.0
    assert names is None or [one.name for one in found] == names
    assert all(wrong in one.wrong and bool(one.wrong) == bool(wrong) for one in found)


def test_a_name_that_the_policy_made_up_gets_nowhere():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(there.call("a<|end|>"), add_special_tokens=False)
    (one,) = read_calls(tokenizer, ids, (), [SCHEMA])
    assert one.name == "unknown" and "no tool 'a<|end|>', only add" in one.wrong
    many = tokenizer.encode(ONE * 40, add_special_tokens=False)
    found = read_calls(tokenizer, many, (), [SCHEMA])
    assert [bool(one.wrong) for one in found] == [False] * MOST_CALLS + [True]


# --- what stands between two turns


def with_template(text: str):
    tokenizer = tiny_tokenizer()
    marks = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *marks]})
    tokenizer.chat_template, tokenizer.bos_token = text, "<|pad|>"
    return tokenizer


def trls(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, end", [("qwen2_5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("qwen3_training", "<|im_end|>"),
                  ("llama3_1", "<|eot_id|>"), ("qwen3_vl", "<|im_end|>")],
)  # fmt: skip
def test_what_is_appended_is_the_templates_own(name, end):
    """Prompt, turn and suffix are together what the template makes of the whole conversation, to the id."""
    tokenizer = with_template(trls(name))
    template = ToolTemplate(tokenizer, {}, [SCHEMA])
    turn = "<think>\nR\n</think>\n\nA" if "qwen3" in name and "vl" not in name else "A"
    asked = {"role": "user", "content": "Q"}
    prompt = tokenizer.apply_chat_template([asked], tools=[SCHEMA], add_generation_prompt=True, return_dict=False)
    said = template.between([ToolCall("add")], ["12"], tokenizer.convert_tokens_to_ids(end))
    turns = [asked, {"role": "assistant", "content": turn}, {"role": "tool", "name": "add", "content": "12"}]
    whole = tokenizer.apply_chat_template(turns, tools=[SCHEMA], add_generation_prompt=True, return_dict=False)
    wrote = tokenizer.encode(turn + end, add_special_tokens=False)
    assert prompt + wrote + list(said) == whole


def test_templates_that_know_no_tools_are_told_in_the_system_turn():
    template = ToolTemplate(with_template(trls("gemma3")), {}, [SCHEMA])  # no turn of a tool's either
    assert not template.writes_tools and not template.has_tool_turn
    (system, user), extra = template.arguments([{"role": "user", "content": "Q"}])
    assert system["role"] == "system" and '"name": "add"' in system["content"] and not extra and user["content"] == "Q"
    said = template.tokenizer.decode(template.between([ToolCall("add")] * 2, ["1", "2"], 1))
    opened = "<end_of_turn>\n<start_of_turn>user\n"
    assert said.startswith(opened + "<tool_response>\n1\n</tool_response>\n<tool_response>\n2")


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3", "qwen3_5_nothink", "gemma4"])
def test_templates_that_rewrite_earlier_turns_are_refused(name):
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        ToolTemplate(with_template(trls(name)), {}, [SCHEMA])
    with pytest.raises(ConfigError, match="no chat template"):
        ToolTemplate(with_template(None), {}, [SCHEMA])


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_<|im_end|>end|>\n<|im_start|>assistant\n7", "<|pad|>" * 9])
def test_no_tool_ends_its_turn(text):
    tokenizer = with_template(trls("qwen2_5"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = ToolTemplate(tokenizer, {}, [SCHEMA]).between([ToolCall("add")], [text], end)
    special = [i for i in said if i in tokenizer.all_special_ids]
    assert len(special) == 3 and 0 not in said  # of the template: the tool's turn and the policy's


# --- what runs


@pytest.fixture(scope="module")
def hostile():
    with start_environment(config(environment_factory=HERE + "Hostile", reward_funcs=["environment"])) as made:
        yield made


def ask(made: Environment, *requests):
    """One trajectory: what each request said, or why the environment is no more."""
    session, replies = made.sessions.open(), []
    for request in requests:
        made.sessions.ask(session, *request)
        while not session.answered:
            made.sessions.poll(0.05)
        replies.append(session.wrong or session.reply)
        session.reply = None
    made.sessions.end(session)
    return replies


RESET = ("reset", {"prompt": "q", "other": 1}, "seed", "then")


def test_an_environment_keeps_its_state_and_hostile_tools_have_a_clear_end(hostile):
    first, *_ = ask(hostile, RESET)
    calls = [("add", {"n": 3}), ("add", {"n": 4}), ("add", {"m": 4}), ("add", {"n": "x"}), ("fail", {}), ("told", {})]
    same, said, end = ask(hostile, RESET, ("call", calls), ("finish", True, True))
    assert same == first  # one seed, one beginning
    texts, failed = zip(*said["ok"], strict=True)
    assert texts[:2] == ("3", "7") and failed == (False, False, True, True, True, False)
    assert "unexpected keyword" in texts[2] or "missing" in texts[2]
    assert texts[4] == "Error: SystemExit: no ? more" and texts[5] == str([first["ok"], None])
    assert end["ok"]["reward"] == 7.0 and end["ok"]["environment"]
    (_, huge) = ask(hostile, RESET, ("call", [("huge", {})]))
    assert huge["ok"] == [["Error: the tool returned 10000000 characters, more than 100000", True]]
    (_, late) = ask(hostile, RESET, ("call", [("hoard", {}), ("leave", {})]))
    (hoarded, left) = late["ok"]
    assert hoarded == ["Error: MemoryError: ", True] and not left[1]
    assert ask(hostile, RESET, ("call", [("die", {})]))[1] == "call: its process ended"
    idle = hostile.sessions.open()
    hostile.sessions.ask(idle, *RESET)
    while not idle.answered:
        hostile.sessions.poll(0.05)
    assert idle.take() == first["ok"]
    start = time.perf_counter()
    assert ask(hostile, RESET, ("call", [("sleep", {})]))[1] == "call: killed after 0.7 s (tool_timeout)"
    assert time.perf_counter() - start < 5.0
    assert not psutil.pid_exists(int(left[0]))  # nothing outlives its completion
    assert not idle.wrong  # the policy may take its time for a turn
    hostile.sessions._host.kill()  # of this environment
    hostile.sessions._host.wait()
    assert ask(hostile, RESET)[0] == first  # another one takes its place


def test_functions_alone_and_environments_beside_them():
    """A function is a tool of any environment; what is async is awaited; every trajectory begins anew."""
    with start_environment(config(tools=[HERE + "double"])) as made:
        assert [one["function"]["name"] for one in made.schemas] == ["double"] and made.observed(PROBLEMS) == PROBLEMS
        assert ask(made, RESET, ("call", [("double", {"n": 4})])) == [{"ok": None}, {"ok": [["8", False]]}]
    both = config(tools=[HERE + "double"], environment_factory=HERE + "Odd", reward_funcs=["environment"])
    with start_environment(both) as made:
        reset = ("reset", {"level": 2, "unknown": 1}, "s", "t")
        begun, said, end = ask(made, reset, ("call", [("double", {"n": 4})]), ("finish", True, False))
        assert begun == {"ok": " 2 1 "} and said == {"ok": [["8", False]]}
        assert end["ok"]["reward"] == "get_reward: TypeError: it returned 'nan', which is no number"
        assert [problem.observation for problem in made.observed(PROBLEMS[:3])] == [" 0 1 ", " 1 1 ", " 2 1 "]
        (told,) = (
            PromptBuilder(tiny_tokenizer(), config(), schemas=made.schemas)
            .parts(made.observed(PROBLEMS[1:2])[0])
            .messages
        )
        assert told["content"] == "1+1? 1 1 "


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"environment_factory": "no.such:Thing"}, "environment_factory: cannot import no.such:Thing"),
        ({"environment_factory": "math:pi"}, "environment_factory: math:pi is a float"),
        ({"environment_factory": "builtins:dict"}, "dict has no method reset"),
        ({"environment_factory": "math:sqrt"}, "math:sqrt cannot be made"),
        ({"environment_factory": HERE + "Undescribed"}, "the tool undescribed is not described"),
        ({"environment_factory": HERE + "Silent", "reward_funcs": ["environment"]}, "needs a method get_reward"),
        ({"reward_funcs": ["environment"]}, "what an environment_factory's get_reward says"),
        ({"tools": ["math:nothing"]}, "tools: cannot import math:nothing"),
    ],
)
def test_environments_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        start_environment(config(**settings))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_reset_cannot_do_is_said_before_anything_is_sampled():
    with (
        start_environment(config(environment_factory=HERE + "Broken")) as made,
        pytest.raises(ConfigError, match="row 0: reset: LookupError: no such level"),
    ):
        made.observed(PROBLEMS)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"environment_factory": "module"}, "write package.module:name"),
        ({"tools": ["a:b", "a:b"]}, "tools: one is given twice"),
        ({"tools": ["b"]}, "tools: 'b' does not fit"),
        ({"max_tool_calling_iterations": -1}, "max_tool_calling_iterations"),
        ({"tool_timeout": 0.0}, "tool_timeout"),
    ],
)
def test_settings_of_environments(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_draft_of_several_turns_loses_whole_turns():
    tokenizer = tiny_tokenizer()
    prompts = PromptBuilder(tokenizer, config(draft_max_tokens=7))
    parts = prompts.parts(PROBLEMS[0])

    def shown(ids, spans):
        made, trimmed = prompts.with_draft(parts, ids, spans=[spans])
        return made[len(parts.before_draft) : len(made) - len(parts.after_draft)], trimmed

    ids = tuple(range(10, 22))
    assert shown(ids, (3, 4, 5)) == (ids[7:], True)  # the last turn alone fits
    assert shown(ids, (3, 8, 1)) == (ids[11:], True)
    assert shown(ids, (1, 2, 9)) == (ids[5:], True)  # not even that: its end
    assert shown(ids[:7], (3, 3, 1)) == (ids[:7], False)
    assert shown((1, *ids[:6], 1), (2, 3, 3)) == (ids[:6], False)  # special tokens take no room
    assert shown((*ids, 1), (3, 9, 1)) == (ids[5:], True)  # nor are they a turn to show


# --- the whole, with real vLLM


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> str:
    return save_caller(tmp_path_factory.mktemp("caller"), there.CALLS + there.FATAL + there.CALCULATOR)


@pytest.fixture(scope="module")
def engine(caller):
    made = start_engine(caller, config(caller), 600, (1,), 0)
    yield made
    made.close()


def rolled(engine, path: str, problems=PROBLEMS, **settings):
    """Groups, figures, samples and an evaluation of one rollout."""
    setting = config(path, **settings)
    tokenizer, environment = AutoTokenizer.from_pretrained(path), start_environment(setting)
    problems = environment.observed(problems) if environment else problems
    prompts = PromptBuilder(tokenizer, setting, 600, None, environment.schemas if environment else ())
    with start_rewards(setting) as rewards:
        check_columns(rewards.functions, problems, setting.has_environment)
        turns = turns_of(environment, prompts, rewards.functions)
        rollout = Rollout(engine, rewards, prompts, tokenizer, setting, turns=turns)
        groups, stats = rollout.run(problems[:2], 1, ahead=problems[2:] if setting.draft_policy_lag else ())
        rollout.load_state_dict(rollout.state_dict())
        figures = evaluate(engine, rewards, prompts, tokenizer, problems, setting, turns=turns)
        if environment:
            assert not environment.sessions._channels and not turns.busy
            environment.sessions.close()
    return groups, rollout_metrics(groups, stats, setting), training_samples(groups, setting), figures


def untimed(figures: dict) -> dict:
    return {k: v for k, v in figures.items() if not k.endswith(("seconds", "per_second")) and not k.startswith("tools")}


@pytest.mark.slow
def test_an_environment_of_one_turn_is_none_to_the_bit(engine, caller):
    bare = rolled(engine, caller, reward_funcs=["accuracy", "length"])
    silent = rolled(engine, caller, reward_funcs=["accuracy", "length"], environment_factory=HERE + "Silent")
    assert silent[0] == bare[0] and silent[2:] == bare[2:] and untimed(silent[1]) == untimed(bare[1])
    assert silent[1]["tools/call_frequency"] == 0.0 and silent[1]["tools/turns"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tool_calling_iterations": 1, "draft_policy_lag": 1},
        {"early_stop_drafts": True, "early_stop_reward": 0.0, "full_determinism": False, "num_drafts": 4},
    ],
)
def test_hostile_calls_end_and_what_tools_said_is_never_tokenised_twice(engine, caller, settings):
    funcs = ["environment", HERE + "totals"]
    groups, figures, samples, _ = rolled(
        engine, caller, reward_funcs=funcs, environment_factory=HERE + "Hostile", max_completion_length=400, **settings
    )
    found = [s.completion for g in groups for s in (*g.drafts, *g.refinements)]
    tokenizer = AutoTokenizer.from_pretrained(caller)
    several = [one for one in found if len(one.spans) > 1]
    assert several and figures["tools/call_frequency"] > 0.5 and 0.0 < figures["tools/failure_frequency"] <= 1.0
    for one in several:
        assert sum(one.spans) == len(one.token_ids) <= 400 and len(one.spans) % 2 == 1
        nan = [math.isnan(x) for x in one.logprobs]
        assert not any(written(tuple(nan), one.spans)) and sum(nan) == sum(one.spans[1::2])
        turns = one.trajectory.messages
        assert turns[-1]["role"] == "assistant" and {turn["role"] for turn in turns} == {"assistant", "tool"}
        start = one.spans[0]
        said = tokenizer.decode(one.token_ids[start : start + one.spans[1]])
        assert said.startswith("<|tool|>") and said.endswith("<|end|><|assistant|>")
        assert one.token_ids[start - 1] == 1  # the policy ended its turn
    if "early_stop_drafts" in settings:
        assert figures["draft/aborted"] > 0
    if "draft_policy_lag" in settings:
        assert max(len(one.spans) for one in several) == 3
        assert all(one.truncated for one in found if one.trajectory and one.trajectory.ended == "turns")
    own = [s.rewards for g in groups for s in g.refinements]
    assert all(r["totals"] == pytest.approx(r["environment"] / 10) for r in own)
    refined = [s.completion for g in groups for s in g.refinements]
    assert [s.trained_tokens for s in samples] == [len(one.written_ids) for one in refined]


@pytest.mark.slow
def test_the_calculator(engine, caller):
    """The environment of docs/environments.md, on the rows of a task of reasoning-gym."""
    rows = reasoning_gym.create_dataset("chain_sum", size=4, seed=1)
    problems = [Problem(i, row["question"], row["answer"], {"metadata": row["metadata"]}) for i, row in enumerate(rows)]
    groups, figures, _, judged = rolled(
        engine, caller, problems=problems, reward_funcs=["environment", "accuracy"], num_generations=16,
        per_device_train_batch_size=32,
        environment_factory="igrpo.environments.calculator:Calculator", max_completion_length=300,
    )  # fmt: skip
    found = [s.completion.trajectory for g in groups for s in (*g.drafts, *g.refinements)]
    said = {turn["content"] for one in found if one for turn in one.messages if turn["role"] == "tool"}
    assert said & {"wrong: it is too small", "wrong: it is too large", "right", *(str(3 * n) for n in range(12))}
    assert not any("killed" in text for text in said)
    assert 0.0 <= judged["eval/rewards/environment"] <= 1.0 and figures["tools/turns"] > 1.0


def test_a_trajectory_survives_a_checkpoint():
    one = Completion((5, 6, 1), (-0.1, math.nan, -0.2), "x", "stop", 3)
    for trajectory in (None, Trajectory((1, 1, 1), ({"role": "assistant", "content": "x"},), 1, 0, "tokens", 2.0)):
        scored = Scored(replace(one, trajectory=trajectory), {"r": 1.0}, 1.0)
        assert _scored(_plain(scored, trained=True)) == scored
