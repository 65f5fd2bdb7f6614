"""Load and save weights in every format that Conditional DETR is published in."""
