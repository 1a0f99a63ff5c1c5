"""Fixtures of the torch tests: a fixed seed, and comparison with torch's own attention."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
