"""Ready-made DALI pipelines and the loaders that feed them to PyTorch. Run from the root of the repository."""
