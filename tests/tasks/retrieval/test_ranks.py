"""Ranks against sorted lists, with ties, several captions per image, and products in chunks."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.errors import DataError, NumericsError
from tasks.retrieval.ranks import Ranks, pair_ranks


def brute_force(
    images: Tensor, captions: Tensor, image_of: list[int]
) -> tuple[list[int], list[int]]:
    """Ranks by sorting the candidates of a query, correct ones after wrong ones of equal score."""
    scores = (images.double() @ captions.double().T).tolist()
    forward = []
    for image, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-row[j], image_of[j] == image))
        forward.append(next(place for place, j in enumerate(order) if image_of[j] == image))
    backward = []
    for caption, image in enumerate(image_of):
        column = [row[caption] for row in scores]
        order = sorted(range(len(column)), key=lambda i: (-column[i], i == image))
        backward.append(order.index(image))
    return forward, backward


def owners(images: int, seed: int) -> list[int]:
    """Image of each caption: one to five captions per image."""
    counts = np.random.default_rng(seed).integers(1, 6, images)
    return np.repeat(np.arange(images), counts).tolist()


def related(images: int, image_of: list[int], width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of images, and of captions near their images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, width, generator=generator)
    y = x[image_of] + 2 * torch.randn(len(image_of), width, generator=generator)
    return F.normalize(x, dim=-1), F.normalize(y, dim=-1)


def check(found: Ranks, images: Tensor, captions: Tensor, image_of: list[int]) -> None:
    forward, backward = brute_force(images, captions, image_of)
    assert found.image_to_text.tolist() == forward
    assert found.text_to_image.tolist() == backward
    assert found.image_to_text.dtype == found.text_to_image.dtype == np.int32


@pytest.mark.parametrize("scores_at_a_time", [1, 150, 2**24])
@pytest.mark.parametrize("images", [2, 41])
def test_random_embeddings(
    monkeypatch: pytest.MonkeyPatch, images: int, scores_at_a_time: int
) -> None:
    monkeypatch.setattr("tasks.retrieval.ranks._SCORES", scores_at_a_time)
    image_of = owners(images, 0)
    x, y = related(images, image_of, 16, 1)
    found = pair_ranks(x, y, np.array(image_of))
    check(found, x, y, image_of)
    if images > 2:
        assert found.image_to_text.min() == 0 < found.image_to_text.max()
        assert found.text_to_image.min() == 0 < found.text_to_image.max()
    scores = x.double() @ y.double().T
    assert found.best_caption.tolist() == scores.argmax(1).tolist()
    assert found.best_image.tolist() == scores.argmax(0).tolist()


@pytest.mark.parametrize("scores_at_a_time", [1, 150, 2**24])
@pytest.mark.parametrize("seed", range(5))
def test_ties(monkeypatch: pytest.MonkeyPatch, seed: int, scores_at_a_time: int) -> None:
    """Few exact values: scores are equal within and across images, and so are many embeddings."""
    monkeypatch.setattr("tasks.retrieval.ranks._SCORES", scores_at_a_time)
    image_of = owners(30, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (30, 4), generator=generator) / 4
    y = torch.randint(0, 3, (len(image_of), 4), generator=generator) / 4
    assert len((x @ y.T).unique()) < 20
    check(pair_ranks(x, y, np.array(image_of)), x, y, image_of)


def test_captions_need_not_stand_together() -> None:
    image_of = np.random.default_rng(0).permutation(owners(20, 3)).tolist()
    x, y = related(20, image_of, 8, 2)
    check(pair_ranks(x, y, np.array(image_of)), x, y, image_of)


def test_perfect_embeddings() -> None:
    image_of = np.repeat(np.arange(10), 5)
    x = torch.eye(10)
    found = pair_ranks(x, x[image_of], image_of)
    assert not found.image_to_text.any()
    assert not found.text_to_image.any()
    assert found.best_image.tolist() == image_of.tolist()
    assert image_of[found.best_caption].tolist() == list(range(10))


@pytest.mark.parametrize("width", [7, 64, 100, 512])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_constant_embeddings_are_last(
    monkeypatch: pytest.MonkeyPatch, width: int, rows: int
) -> None:
    """A product rounds equal columns by their place, which must not look like a difference."""
    monkeypatch.setattr("tasks.retrieval.ranks._SCORES", rows * 303)
    generator = torch.Generator().manual_seed(width)
    vectors = F.normalize(torch.randn(2, width, generator=generator), dim=-1)
    image_of = np.repeat(np.arange(101), 3)
    found = pair_ranks(
        vectors[:1].expand(101, -1).contiguous(), vectors[1:].expand(303, -1).contiguous(), image_of
    )
    assert (found.image_to_text == 300).all()
    assert (found.text_to_image == 100).all()


def test_equal_captions_of_two_images_count_against_both() -> None:
    x = torch.eye(3)
    y = torch.stack([x[0], x[0], x[2]])
    found = pair_ranks(x, y, np.array([0, 1, 2]))
    assert found.image_to_text.tolist() == [1, 2, 0]
    assert found.text_to_image.tolist() == [0, 2, 0]


def test_own_captions_do_not_stand_in_each_others_way() -> None:
    x = torch.eye(2)
    found = pair_ranks(x, x[[0, 0, 0, 1]], np.array([0, 0, 0, 1]))
    assert found.image_to_text.tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_embeddings_that_are_no_numbers_are_refused(value: float, which: int) -> None:
    image_of = owners(9, 0)
    both = related(9, image_of, 4, 0)
    both[which][5, 2] = value
    with pytest.raises(NumericsError, match="NaN or infinite"):
        pair_ranks(*both, np.array(image_of))


def test_an_image_without_captions_is_refused() -> None:
    x = torch.eye(4)
    with pytest.raises(DataError, match="2 of 4 images have no caption; the first is number 1"):
        pair_ranks(x, x[[0, 2]], np.array([0, 2]))
