"""Conversion between DALI's lists of samples and batch arrays."""

from __future__ import annotations

import numpy as np
import pytest

from dali_saliencymix._dali.bridge import as_batch, as_samples


def test_samples_that_lie_in_one_block_become_a_view(xp):
    block = xp.arange(4 * 5 * 3 * 2, dtype=xp.int32).reshape(4, 5, 3, 2)
    batch = as_batch(list(block))
    assert xp.shares_memory(batch, block) if xp is np else batch.data.ptr == block.data.ptr
    assert (batch == block).all()


def test_samples_with_even_gaps_become_a_view():
    block = np.arange(4 * 8, dtype=np.int16).reshape(4, 8)
    batch = as_batch([row[:6] for row in block])
    assert np.shares_memory(batch, block)
    np.testing.assert_array_equal(batch, block[:, :6])


@pytest.mark.parametrize(
    "order",
    [[0, 2, 1], [2, 1, 0], [0, 0, 0], [0, 1, 3]],
    ids=["swapped", "backwards", "one thrice", "a gap"],
)
def test_other_samples_are_stacked(order):
    block = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
    samples = [block[i] for i in order]
    batch = as_batch(samples)
    assert not np.shares_memory(batch, block)
    np.testing.assert_array_equal(batch, block[order])


def test_samples_that_are_not_contiguous_are_stacked():
    block = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    samples = [sample.T for sample in block]
    np.testing.assert_array_equal(as_batch(samples), block.transpose(0, 2, 1))
    samples = [block[0], block[1].T, block[2]]  # evenly spaced, but with different strides
    np.testing.assert_array_equal(as_batch(samples), np.stack(samples))


def test_a_single_sample_is_a_batch_of_one():
    assert as_batch([np.zeros((2, 3), np.uint8)]).shape == (1, 2, 3)


def test_samples_of_several_shapes_are_refused_with_the_remedy():
    samples = [np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"one shape, got 2 shapes: \(4, 5, 3\), \(5, 4, 3\); resize or crop"):
        as_batch(samples)


def test_numbers_come_out_as_arrays(xp):
    samples = as_samples(xp.arange(3, dtype=xp.float32))
    assert [sample.shape for sample in samples] == [(), (), ()]
    assert all(isinstance(sample, xp.ndarray) for sample in samples)
