"""Judges, metrics on held-out items, samples and the report of a run."""
