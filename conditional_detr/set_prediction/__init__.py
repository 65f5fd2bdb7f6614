"""Set prediction: Hungarian matching of predictions and targets, and the loss on the matched pairs."""
