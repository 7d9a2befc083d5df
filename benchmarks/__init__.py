"""Measures this package against its peers and against what the machine allows. Start with `pytest benchmarks/`."""
