"""Match predictions with targets by the Hungarian algorithm and compute the set loss on the matched pairs."""
