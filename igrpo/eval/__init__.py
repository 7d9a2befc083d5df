"""Evaluation: ``igrpo eval`` and the bare-prompt evaluation during training, on the same sampling code."""
