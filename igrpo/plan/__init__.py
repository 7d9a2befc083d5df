"""``igrpo plan``: memory, step time and GPU-hours of a recipe, predicted before anything is bought or loaded."""

from igrpo.plan.command import main

__all__ = ["main"]
