"""Speed and memory of this project and its peers, compared in one run: ``python -m benchmarks``. See README.md here."""
