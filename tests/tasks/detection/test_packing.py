"""Packing of pyramids: exact both ways, every value at its place, clear refusals."""

import pytest
import torch

from fimaq_core.errors import ModelError
from tasks.detection.neck import pack, unpack


@pytest.mark.parametrize("channels", [[3, 5, 2, 4], [6, 1], [7]])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (5, 7)])
def test_unpacking_gives_what_was_packed(channels: list[int], height: int, width: int) -> None:
    last = len(channels) - 1
    maps = [
        torch.randn(2, c, height * 2 ** (last - i), width * 2 ** (last - i))
        for i, c in enumerate(channels)
    ]
    packed = pack(maps)
    assert packed.shape == (
        2,
        sum(c * 4 ** (last - i) for i, c in enumerate(channels)),
        height,
        width,
    )
    assert packed.numel() == sum(one.numel() for one in maps)
    for found, expected in zip(unpack(packed, channels), maps, strict=True):
        assert torch.equal(found, expected)


def test_where_each_value_goes() -> None:
    fine, coarse = torch.randn(1, 3, 6, 4), torch.randn(1, 2, 3, 2)
    packed = pack([fine, coarse])
    for row in range(3):
        for column in range(2):
            cell = fine[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = [cell[c, i, j] for c in range(3) for i in range(2) for j in range(2)] + list(
                coarse[0, :, row, column]
            )
            assert packed[0, :, row, column].tolist() == [float(value) for value in expected]


def test_gradients_pass_unchanged() -> None:
    maps = [
        torch.randn(1, 2, 8, 4, requires_grad=True),
        torch.randn(1, 3, 4, 2, requires_grad=True),
    ]
    weights = [torch.randn_like(one) for one in maps]
    loss = sum(
        (found * weight).sum()
        for found, weight in zip(unpack(pack(maps), [2, 3]), weights, strict=True)
    )
    for found, expected in zip(torch.autograd.grad(loss, maps), weights, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "sizes", [[(8, 8), (4, 5)], [(7, 8), (4, 4)], [(8, 8), (4, 4), (1, 2)], [(4, 4), (8, 8)]]
)
def test_other_factors_are_refused(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(ModelError, match=r"twice as high and wide.*multiples"):
        pack([torch.zeros(1, 2, *size) for size in sizes])


def test_nothing_to_pack_and_other_channels_are_refused() -> None:
    with pytest.raises(ModelError, match="no maps"):
        pack([])
    with pytest.raises(ModelError, match="24 channels"):
        unpack(torch.zeros(1, 24, 2, 2), [5, 3])
