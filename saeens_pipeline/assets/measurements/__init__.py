"""Computation of table rows. These modules load torch and are imported when rows are computed."""
