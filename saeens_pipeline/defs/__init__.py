"""One folder per experiment, each with a `defs.yaml`."""
