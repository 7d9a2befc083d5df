"""How reward functions are named, found and weighted."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest

from igrpo.config.train_config import ConfigError, TrainConfig
from igrpo.rewards.functions import (
    RewardFunction,
    highest_reward,
    load_reward_functions,
    reward_names,
)
from igrpo.rewards.functions import accuracy as accuracy_of
from igrpo.rewards.setup import start_rewards
from igrpo.rollout import metrics


def test_names_become_functions():
    functions = load_reward_functions(["accuracy", "format", "tests.support.bad_rewards:raises"])
    assert functions[0] == RewardFunction("accuracy", "igrpo.rewards.functions:accuracy")  # no config, no options
    assert [function.name for function in functions] == ["accuracy", "format", "raises"]
    assert functions[2].load()(["abc"]) == [3.0]
    (own,) = load_reward_functions(["tests.support.bad_rewards:length"])  # the name is a built-in's, chosen here or not
    assert own.name == own.path and own.load()(["abc"]) == [3.0]


@pytest.mark.parametrize(
    "names",
    [
        ["tests.support.bad_rewards.raises"],  # as TRL writes it
        ["tests.support.bad_rewards:length", "format"],  # a built-in's name
        ["think_format_reward"],
    ],
)
def test_names_in_the_log_are_known_without_loading(names):
    """The reward that judges right from wrong is looked up by this name; a wrong one read as accuracy 0."""
    loaded = [function.name for function in load_reward_functions(names)]
    assert reward_names(names) == loaded
    assert (
        metrics.correctness_reward(TrainConfig(model_name_or_path="m", dataset_name="d", reward_funcs=names))
        == loaded[0]
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["acuracy"], r"unknown 'acuracy' \(known: accuracy, format, reasoning_gym_score.*did you mean 'accuracy'"),
        (["format", "format"], "'format' is given twice"),
        (["no_such_module:f"], "cannot import module 'no_such_module'.*ModuleNotFoundError"),
        (["tests.support.bad_rewards:lenght"], "no 'lenght'; did you mean 'length'"),
        (["tests.support.bad_rewards:os"], "is a module, not a function"),
        (["__main__:f"], "should read package.module:function"),
        (["tests.support:"], "should read package.module:function"),
    ],
)
def test_wrong_names_say_what_is_wrong(names, message):
    with pytest.raises(ValueError, match=message):
        load_reward_functions(names)


def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import surely_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"broken_rewards.*No module named 'surely_not_there'"):
        load_reward_functions(["broken_rewards:f"])


def test_the_overlong_punishment_is_dapos_and_trls():
    from trl.rewards import get_soft_overlong_punishment

    config = TrainConfig(
        model_name_or_path="m", dataset_name="d", reward_funcs=["soft_overlong_punishment"], max_completion_length=50,
        soft_punish_cache=20,
    )  # fmt: skip
    (function,) = load_reward_functions(config.reward_funcs, config)
    lengths = [[1] * n for n in range(61)]
    theirs = get_soft_overlong_punishment(50, 20)(completion_ids=lengths)
    assert function.load()(completion_ids=lengths, prompts=[""] * 61) == pytest.approx(theirs)
    assert theirs[30] == 0.0 and theirs[40] == -0.5 and theirs[50] == theirs[60] == -1.0


def test_the_highest_reward_counts_weights_and_leaves_users_functions_open():
    config = TrainConfig(model_name_or_path="m", dataset_name="d", reward_weights=[2.0, 0.5])
    assert highest_reward(config) == 2.5
    assert highest_reward(replace(config, reward_funcs=["accuracy", "my.module:f"])) is None
    assert highest_reward(replace(config, reward_funcs=["a:b", "c:d"], early_stop_reward=3.0)) == 3.0
    dapo = replace(config, reward_funcs=["accuracy", "soft_overlong_punishment"], soft_punish_cache=100)
    assert highest_reward(dapo) == 2.0


def settings(**changed) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", **changed)


def test_math_verify_judges_alone_where_it_is_asked_to():
    """Training's and evaluation's functions alike; a column of the setting's name does not change it."""
    completions, ids = [r"<think>so 2^{10}, \boxed{2^{10}}", r"\boxed{1025}"], [[1], [1, 2]]
    arguments = {
        "prompts": ["What is $2^{10}$?"] * 2, "completions": completions, "solution": ["1024"] * 2,
        "completion_ids": ids, "prompt_suffix": [""] * 2, "grader": ["a column"] * 2,
    }  # fmt: skip
    for grader, right in (("igrpo", 0.0), ("math_verify", 1.0)):
        names = ["accuracy", "cosine", "length"]
        accuracy, cosine, length = (
            function.load()(**function.sees(arguments))
            for function in load_reward_functions(names, settings(reward_funcs=names, grader=grader))
        )
        assert accuracy == [right, 0.0]
        assert (cosine[0] > 0.9) == bool(right) and length == [0.5 if right else 0.0, -0.5]


HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}", r"\boxed{((9!)!)!}", r"$9^{9^{9^9}}$", "9**9**9**9", r"\boxed{100000000!}",
    r"\boxed{" + "{" * 900 + "7" + "}" * 900 + "}", r"\boxed{" + "(" * 900 + "7" + ")" * 900 + "}", r"\boxed{" * 3000,
    r"\boxed{" + "7" * 1_000_000 + "}", r"\boxed{" + r"\frac{1}{" * 300 + "7" + "}" * 300 + "}", "$1$ " * 5000,
    r"\boxed{\binom{10000000}{5000000}}", r"\boxed{\sum_{i=1}^{100000000} i^{i}}", r"\boxed{\int_0^1 e^{x^{x^x}} dx}",
    r"\boxed{(x+y+z)^{500}}", "\\boxed{9^\n{9^{9}}}", r"\begin{equation}9^{9^{9}}\end{equation}", "\\boxed{7\0 2}",
]  # fmt: skip


def test_what_math_verify_would_never_work_out_is_wrong_at_once():
    started = time.monotonic()
    assert accuracy_of(HOSTILE, ["72"] * len(HOSTILE), grader="math_verify") == [0.0] * len(HOSTILE)
    assert accuracy_of([r"As $9^{9^{9^9}}$ is big, \boxed{72}"], ["72"], grader="math_verify") == [1.0]
    assert accuracy_of([r"\boxed{2}"], [["1", "2"]], grader="math_verify") == [1.0]
    priced = r"Each costs \$5 " + "and so on " * 70 + "$x^2+1$"
    assert accuracy_of([priced], ["x^2+1"], grader="math_verify") == [1.0]
    assert accuracy_of([r"\boxed{2}"], [""], grader="math_verify") == [None]
    assert time.monotonic() - started < 8  # a second or two; a shared machine may be slow


def test_a_grader_that_is_not_installed_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"^grader: math_verify is not installed; pip install .* or write igrpo$"):
        start_rewards(settings(grader="math_verify"))
