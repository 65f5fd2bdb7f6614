"""Analyse the errors of detections: what goes wrong, how much it costs, and where."""
