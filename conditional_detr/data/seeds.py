"""Seeds for independent random streams."""

import numpy as np


def derive_seed(*numbers: int, bits: int = 64) -> int:
    """Derive a seed from several numbers, such as the run's seed, the epoch and the sample's index.

    Args:
        numbers: at least 0 each. Streams of neighbouring numbers are independent.
        bits: 1 to 64, the width of the seed.

    Returns:
        A whole number in [0, 2**bits).
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0]) >> (64 - bits)
