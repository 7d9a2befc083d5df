"""iGRPO: two-stage GRPO training. Run it with ``python -m igrpo.train``; see README.md."""
