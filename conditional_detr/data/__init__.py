"""Datasets in COCO format: read, check, augment, batch; and one that is drawn from a seed."""
