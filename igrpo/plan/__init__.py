"""``igrpo plan``: memory, step time and GPU-hours of a recipe, predicted before anything is bought or loaded."""
