"""The rewards of a run, from its config."""

from __future__ import annotations

import logging
import os

from igrpo.rewards.config import RewardConfig
from igrpo.rewards.functions import BUILTIN, load_reward_functions
from igrpo.rewards.grading.by_math_verify import check_installed
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rewards.workers.process import worker_environment
from igrpo.settings import ConfigError

logger = logging.getLogger(__name__)


def start_rewards(config: RewardConfig) -> RewardPool:
    """
    Raises:
        ConfigError: a function, the judge or the grader that cannot be used.
    """
    if config.grader == "math_verify":
        check_installed()
    try:
        functions = load_reward_functions(config.reward_funcs, config)
    except ValueError as error:
        raise ConfigError(f"reward_funcs: {error}") from None
    judge = None
    if "judge" in config.reward_funcs:
        from igrpo.rewards.judge import Judge

        judge = Judge(config)
        judge.check()
    users = not all(function.path in BUILTIN.values() for function in functions)
    if users and (missing := [name for name in config.reward_env if name not in os.environ]):
        raise ConfigError(f"reward_env: {missing[0]} is not set; export it, or leave it out")
    environment, kept = worker_environment(config.reward_env, {config.judge_api_key_env})
    if kept and users and os.environ.get("RANK", "0") == "0":
        logger.info("reward functions do not get %s: name those they need in reward_env", ", ".join(kept))
    return RewardPool(
        functions, config.reward_weights, config.reward_workers, config.reward_timeout, config.reward_error_value,
        judge, config.reward_memory_gib, environment,
    )  # fmt: skip
