"""Settings that must be made before a test module is imported."""

import os
import signal

import torch
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that a shell starts in the background ignore it
settings.load_profile("ci")  # the same examples in every run, and no complaint about a slow machine

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does
