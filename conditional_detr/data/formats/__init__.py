"""Readers of annotation formats. Each gives COCO's content and an image folder, which data/coco.py then checks."""
