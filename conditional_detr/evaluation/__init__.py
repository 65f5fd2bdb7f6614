"""Measure detections: COCO's average precision and recall."""
