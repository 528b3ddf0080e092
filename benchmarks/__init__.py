"""Speed and memory of this project, each beside its peers in one run: ``python -m benchmarks``. See README.md here."""
