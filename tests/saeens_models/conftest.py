"""Settings that must be made before a test module is imported."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.load_profile("ci")  # the same examples in every run, and no complaint about a slow machine
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: tests run in several processes, and threads would wait in loops
torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Torch, and with it a team, has two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
