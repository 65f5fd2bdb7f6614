"""The network: one file per box of the paper's figure. Tensors in, tensors out."""
