"""SAE ensembles as a Dagster pipeline: settings, artefacts, runs and reports. The mathematics is in `saeens_models`."""
