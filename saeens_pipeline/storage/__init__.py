"""What lies on disk: names and paths, recipes, activations (Zarr), tables (Parquet)."""
