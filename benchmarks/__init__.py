"""Benchmarks: `python -m benchmarks.speed`, `python -m benchmarks.quality`."""
