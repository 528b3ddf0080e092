"""Dagster: assets from declarations, metadata, automation, schedules, sensors, resources, the instance, and runs. No mathematics."""
