"""Optimise models for inference, and export and quantise them for other runtimes."""
