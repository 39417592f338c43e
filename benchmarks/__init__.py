"""Benchmarks of the package: one script for each question, run from the repository's root. See README.md."""
