"""The pair that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_pair():
    """The golden target (8 layers, hidden 64, vocabulary 512) and its trained head, float32 on the CPU."""
    from eagle_lab.models import load

    torch.set_num_threads(1)
    return load(GOLDEN / "target", GOLDEN / "draft_official", device="cpu", dtype="float32")
