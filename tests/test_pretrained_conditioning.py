"""Conditioning beside the text. What captions become is compared with diffusers in test_distill_family.py."""

import numpy as np

from lcm_jax.pretrained import text as conditioning


def test_time_ids_have_the_height_first():
    """SDXL's order, of a picture that is not square: original size, crop, target size."""
    found = conditioning.time_ids(64, 96, 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[64, 96, 0, 0, 64, 96]] * 2)
