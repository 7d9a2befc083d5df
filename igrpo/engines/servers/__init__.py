"""vLLM in processes of its own, on this machine or another."""
