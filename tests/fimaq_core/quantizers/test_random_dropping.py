"""Random masks: the hash byte by byte, equal in both forms, and statistics of its bytes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fimaq_core.quantizers.dropping import draw_keys, eager_mask, threshold_of, traced_mask

LARGE = torch.empty(613, 1031)


def keys(count: int, seed: int = 0) -> Tensor:
    return draw_keys(count, torch.Generator().manual_seed(seed))


def plain_bytes(count: int, key: Tensor) -> list[int]:
    """The definition in Python's integers: four bytes of a word, the lowest first."""
    low, high = (int(part) & 0xFFFFFFFF for part in key)
    found: list[int] = []
    for number in range((count + 3) // 4):
        h = (number * 0x9E3779B9 + low) & 0xFFFFFFFF
        h ^= h >> 15
        h = (h * 0x85EBCA6B + high) & 0xFFFFFFFF
        h ^= h >> 13
        h = (h * 0xC2B2AE35) & 0xFFFFFFFF
        h ^= h >> 16
        found += [(h >> shift) & 255 for shift in (0, 8, 16, 24)]
    return found[:count]


def mask_bytes(like: Tensor, key: Tensor) -> Tensor:
    """Each element's byte, found by bisection from masks alone; float64."""
    found = torch.zeros(like.shape)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        # The byte is at least t where the mask of threshold t is 0.
        thresholds = found + bit
        at_least = torch.zeros(like.shape)
        for threshold in thresholds.unique().tolist():
            chosen = thresholds == threshold
            at_least[chosen] = 1 - eager_mask(like, key, int(threshold))[chosen]
        found += bit * at_least
    return found.double()


@pytest.mark.parametrize(
    "shape", [(1,), (3,), (5,), (4, 8), (7, 3, 5), (2, 3, 17, 17), (32, 17, 33), (1021,)]
)
@pytest.mark.parametrize("threshold", [0, 1, 64, 128, 255, 256])
def test_both_forms_equal_the_definition(shape: tuple[int, ...], threshold: int) -> None:
    like = torch.empty(shape)
    for key in keys(3, seed=sum(shape)):
        expected = (torch.tensor(plain_bytes(like.numel(), key)) < threshold).view(shape)
        traced = traced_mask(like, key, threshold)
        eager = eager_mask(like, key, threshold)
        assert (traced.dtype, eager.dtype) == (torch.bool, torch.float32)
        assert torch.equal(traced, expected)
        assert torch.equal(eager, expected.float())
        assert torch.equal(eager_mask(like, key, threshold, torch.bool), expected)


def test_numbers_follow_the_shape_and_not_the_memory() -> None:
    key = keys(1)[0]
    lying, standing = torch.empty(6, 9), torch.empty(9, 6).mT
    for form in (traced_mask, eager_mask):
        assert torch.equal(form(lying, key, 100), form(standing, key, 100))


def test_thresholds() -> None:
    """One half is exact: 128 of the 256 values of a byte keep an element."""
    for probability, expected in (
        (0.0, 0),
        (0.001, 0),
        (0.25, 64),
        (0.5, 128),
        (0.3, 77),
        (0.999, 256),
        (1.0, 256),
    ):
        assert threshold_of(probability) == expected


@pytest.mark.parametrize("threshold", [1, 26, 64, 77, 128, 230, 255])
def test_share_of_ones(threshold: int) -> None:
    count, p = LARGE.numel(), threshold / 256
    for key in (
        torch.zeros(2, dtype=torch.int32),
        torch.tensor([-1, 1], dtype=torch.int32),
        *keys(6),
    ):
        share = float(eager_mask(LARGE, key, threshold).double().mean())
        assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / count)


def test_bytes_are_uniform() -> None:
    """Chi-square of the bytes' histogram for each place in a word, with 255 degrees of freedom."""
    like = torch.empty(4 * 60_000)
    for key in keys(2, seed=4):
        octets = mask_bytes(like, key).view(-1, 4)
        for place in range(4):
            counts = np.bincount(octets[:, place].long().numpy(), minlength=256)
            expected = len(octets) / 256
            square = float(((counts - expected) ** 2 / expected).sum())
            assert abs(square - 255) <= 4.5 * math.sqrt(2 * 255)


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
    assert abs(correlation) <= 4.5 / math.sqrt(a.numel())


@pytest.mark.parametrize("threshold", [64, 128])
@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 8, 16, 64, 1031])
def test_neighbours_are_independent(threshold: int, distance: int) -> None:
    for key in keys(3, seed=distance):
        mask = eager_mask(LARGE, key, threshold).flatten()
        assert_uncorrelated(mask[distance:], mask[:-distance])


@pytest.mark.parametrize("threshold", [64, 128])
def test_masks_of_different_keys_are_independent(threshold: int) -> None:
    """Keys as a schedule draws them, and keys whose first halves differ by one bit."""
    table = keys(6, seed=1).view(3, 2, 2)
    one = table[0, 0]
    others = [table[0, 1], table[1, 0], table[1, 1], table[2, 0], one.flip(0)]
    for bit in (1, 1 << 10, -(2**31)):
        near = one.clone()
        near[0] ^= bit
        others.append(near)
    mask = eager_mask(LARGE, one, threshold)
    for other in others:
        assert_uncorrelated(mask, eager_mask(LARGE, other, threshold))
    # The same words must not come again further on either.
    second = eager_mask(LARGE, table[1, 0], threshold).flatten()
    for shift in (1, 4, 4096):
        assert_uncorrelated(mask.flatten()[shift:], second[:-shift])


def test_keys_follow_their_generator() -> None:
    first = keys(1000, seed=1)
    assert first.shape == (1000, 2)
    assert first.dtype == torch.int32
    assert torch.equal(first, keys(1000, seed=1))
    assert not torch.equal(first, keys(1000, seed=2))
    assert len(first.unique()) > 1990
    assert_uncorrelated(first[:, 0], first[:, 1])
    # Both signs and both halves of the range.
    assert abs(float((first < 0).double().mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(2000)
