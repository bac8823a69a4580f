"""The sections of `benchmarks/gpu.py`: each a function of a place, which returns what JSON takes."""
