"""Texts with labels, for concept detection and spurious correlation removal: where they come from, and how many are drawn."""
