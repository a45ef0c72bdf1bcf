"""Tests that need PyTorch are collected only where it is installed."""

from importlib.util import find_spec

HAS_TORCH = find_spec("torch") is not None and find_spec("torchax") is not None

collect_ignore = [] if HAS_TORCH else ["test_partial_bnn.py", "test_torch_modules.py"]


def pytest_report_header() -> str:
    if HAS_TORCH:
        return "neurobayes[torch]: installed, tests/torch is collected"
    return "neurobayes[torch]: not installed, tests/torch is left out"
