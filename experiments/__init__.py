"""Does the second stage help, why, and at what cost: each question is one plan, one command and committed JSON."""
