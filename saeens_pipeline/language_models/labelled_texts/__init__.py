"""Labelled texts for concept detection and spurious correlation removal: sources, and drawing of balanced samples."""
