"""Settings that have to be there before a test module is imported."""

import os

import torch
from hypothesis import settings

settings.load_profile("ci")  # the same examples in every run, and no complaint about a slow machine

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does
