"""Seeds derived from several numbers."""

import numpy as np

from conditional_detr.data.seeds import derive_seed


def test_derived_seeds_by_hand():
    assert derive_seed(1, 2, 3) == 12997252459554536576
    assert derive_seed(1, 2, 3, bits=63) == 6498626229777268288


def test_neighbouring_numbers_have_different_seeds():
    seeds = {derive_seed(*numbers, bits=63) for numbers in np.ndindex(8, 8, 8)}
    assert len(seeds) == 512
    assert max(seeds) < 2**63
