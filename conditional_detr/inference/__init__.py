"""Detect objects on images with a model or an exported file."""
