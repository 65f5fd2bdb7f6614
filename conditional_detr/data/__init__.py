"""Datasets in COCO format: read, check, augment and batch; and a synthetic dataset."""
