"""Benchmark of inference and training against transformers, which loads the same weights."""
