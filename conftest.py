"""Settings for every test run: what nbval compares when it runs the notebooks again."""

import os
from pathlib import Path

SANITIZE = Path(__file__).parent / "tests" / "sanitize.cfg"


def pytest_configure(config):
    # Charts as JSON: they can be compared, and the tests need no browser. Kernels inherit this.
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    # nbval resolves a relative path from the caller's folder, so hand it an absolute one.
    if getattr(config.option, "nbval_sanitize_with", "no nbval") is None:
        config.option.nbval_sanitize_with = str(SANITIZE)


def pytest_collectstart(collector):
    # Warnings and progress bars go to stderr and differ from machine to machine.
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
