"""The processes that score: one call cannot hang, kill or outlive the trainer."""
