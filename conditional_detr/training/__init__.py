"""What surrounds the model in training: evaluation on COCO's terms."""
