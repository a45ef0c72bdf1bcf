"""How fast, in how much memory, against which peers: `python -m benchmarks.speed`."""
