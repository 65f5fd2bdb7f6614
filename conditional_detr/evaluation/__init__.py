"""Evaluate detections by COCO's average precision and recall."""
