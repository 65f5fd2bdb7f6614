"""How fast this library is, against the peer that loads the same weights: what is timed, how, and the report."""
