"""Artefacts: their declarations, inputs, recipes and builders. Dagster is not here."""
