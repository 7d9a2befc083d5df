"""The optimiser and the learning-rate schedule, by transformers' names."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from transformers import get_scheduler

from igrpo.learner.config import LearnerConfig
from igrpo.settings import ConfigError


def build_optimizer(policy: torch.nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """Over the parameters that train; norms and biases get no weight decay.

    Raises:
        ConfigError: an unknown ``optim``, or one whose package is not installed.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    make, options = _optimizer_class(config)
    return make([group for group in groups if group["params"]], **options)


def check_settings(config: LearnerConfig) -> None:
    """Refuses an optimiser or a schedule that cannot be had, before a model is loaded.

    Raises:
        ConfigError: an unknown name or option, or learning rates that are not numbers from 0 on.
    """
    _optimizer_class(config)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, total_steps=20)
    rates = []
    for _ in range(20):
        optimizer.step()
        try:
            schedule.step()
        except TypeError as error:  # it waits for a figure of the evaluation
            raise ConfigError(f"lr_scheduler_type: {config.lr_scheduler_type} does not work here ({error})") from None
        rates.append(optimizer.param_groups[0]["lr"])
    wrong = [rate for rate in rates if not 0.0 <= rate < math.inf]
    if wrong or (config.learning_rate > 0 and not any(rates)):  # schedules make 0 of NaN
        rate = wrong[0] if wrong else 0.0
        raise ConfigError(f"lr_scheduler_kwargs: {config.lr_scheduler_kwargs} leads to a learning rate of {rate}")


def _optimizer_class(config: LearnerConfig) -> tuple[Any, dict[str, Any]]:
    if config.optim in ("adamw_torch", "adamw_torch_fused"):
        betas = (config.adam_beta1, config.adam_beta2)
        options = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}
        return torch.optim.AdamW, {**options, "fused": config.optim.endswith("fused")}
    from transformers import Trainer  # its table of optimisers; nothing else of it is used

    named = ("optim", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon")
    arguments = SimpleNamespace(optim_args=None, **{name: getattr(config, name) for name in named})
    try:
        return Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"optim: {config.optim} cannot be had here ({error}); install what it needs, or write adamw_torch_fused"
        ) from None


def build_schedule(optimizer: torch.optim.Optimizer, config: LearnerConfig, total_steps: int) -> Any:
    """The learning rate over ``total_steps`` optimiser steps.

    Raises:
        ConfigError: an unknown schedule or option.
    """
    options = dict(config.lr_scheduler_kwargs)
    if config.lr_scheduler_type == "cosine_with_min_lr" and not options:
        options = {"min_lr_rate": 0.1}
    warmup = config.warmup_steps if config.warmup_steps >= 1 else math.ceil(config.warmup_steps * total_steps)
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(warmup),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=options,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"lr_scheduler_type / lr_scheduler_kwargs: {error}") from None
