"""Artefacts on disk: names and paths, recipes, activations (Zarr), tables (Parquet)."""
