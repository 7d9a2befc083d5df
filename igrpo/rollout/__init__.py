"""From problems to scored groups: prompts, sampling, the two stages, advantages."""
