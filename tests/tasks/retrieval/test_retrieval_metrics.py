"""Measures and their errors against resampling, the binomial form and samples in clusters."""

import math

import numpy as np
import pytest

from tasks.retrieval import metrics
from tasks.retrieval.metrics import CUTS, RESAMPLES, measures, standard_errors


def example(images: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of both directions with one to five captions per image."""
    generator = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(images), generator.integers(1, 6, images))
    forward = generator.geometric(0.3, images) - 1
    backward = np.maximum(0, forward[image_of] + generator.integers(-3, 4, len(image_of)))
    return forward, backward, image_of


def by_hand(forward: np.ndarray, backward: np.ndarray) -> dict[str, float]:
    """The measures of plain samples."""
    found = {}
    for name, ranks in (("i2t", forward), ("t2i", backward)):
        for cut in CUTS:
            found[f"{name}_R@{cut}"] = 100 * sum(rank < cut for rank in ranks.tolist()) / len(ranks)
    found["mean_recall"] = sum(found.values()) / 6
    found["R@1"] = (found["i2t_R@1"] + found["t2i_R@1"]) / 2
    found["i2t_median_rank"] = float(np.median(forward + 1))
    found["t2i_median_rank"] = float(np.median(backward + 1))
    return found


@pytest.mark.parametrize("images", [10, 11, 40])
def test_measures_of_the_sample_itself(images: int) -> None:
    forward, backward, image_of = example(images, images)
    found = measures(forward, backward, image_of, np.ones((1, images), dtype=int))
    expected = by_hand(forward, backward)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == (1,)
        assert found[name][0] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("weights", [40, 2**22])
def test_errors_against_explicit_resampling(monkeypatch: pytest.MonkeyPatch, weights: int) -> None:
    """Samples written out image by image, with the same draws."""
    monkeypatch.setattr(metrics, "_MAX_COUNTS", weights)
    forward, backward, image_of = example(12, 0)
    counts = np.concatenate(list(metrics._draws(12, len(image_of))))
    assert counts.shape == (RESAMPLES, 12)
    assert (counts.sum(1) == 12).all()
    samples: dict[str, list[float]] = {}
    for row in counts.tolist():
        drawn = [image for image, count in enumerate(row) for _ in range(count)]
        captions = [rank for image in drawn for rank in backward[image_of == image].tolist()]
        for name, value in by_hand(forward[drawn], np.array(captions)).items():
            samples.setdefault(name, []).append(value)
    found = standard_errors(forward, backward, image_of)
    assert set(found) == set(samples)
    for name, values in samples.items():
        assert found[name] == pytest.approx(float(np.std(values, ddof=1)), rel=1e-9), name
        assert found[name] > 0


def test_draws_are_multinomial_and_do_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(metrics._draws(50, 250)))
    monkeypatch.setattr(metrics, "_MAX_COUNTS", 1700)
    assert np.array_equal(np.concatenate(list(metrics._draws(50, 250))), whole)
    assert whole.mean() == 1
    assert whole.var() == pytest.approx(1 - 1 / 50, rel=0.02)
    assert np.cov(whole[:, 0], whole[:, 1])[0, 1] == pytest.approx(
        -1 / 50, abs=4 / math.sqrt(RESAMPLES)
    )


def test_one_caption_an_image_gives_binomial_errors() -> None:
    generator = np.random.default_rng(1)
    forward, backward = generator.geometric(0.2, 500) - 1, generator.geometric(0.1, 500) - 1
    found = standard_errors(forward, backward, np.arange(500))
    for name, ranks in (("i2t", forward), ("t2i", backward)):
        for cut in CUTS:
            share = (ranks < cut).mean()
            expected = 100 * math.sqrt(share * (1 - share) / 500)
            # The error of a standard deviation from 1000 draws is 2.2%.
            assert found[f"{name}_R@{cut}"] == pytest.approx(expected, rel=0.09)


def test_captions_that_fail_together_are_one_sample() -> None:
    """Five captions per image, all right or all wrong: the information of one caption."""
    right = np.arange(400) % 4 == 0
    forward, image_of = np.where(right, 0, 20), np.repeat(np.arange(400), 5)
    found = standard_errors(forward, forward[image_of], image_of)
    of_images = 100 * math.sqrt(0.25 * 0.75 / 400)
    assert found["t2i_R@1"] == pytest.approx(of_images, rel=0.09)
    assert found["t2i_R@1"] == pytest.approx(found["i2t_R@1"], rel=1e-9)
    assert found["t2i_R@1"] > 2 * of_images / math.sqrt(5)
    # Both directions fail together as well: their mean is no surer than either.
    assert found["R@1"] == pytest.approx(found["i2t_R@1"], rel=1e-9)


def test_cut_offs_beyond_the_candidates_are_left_out() -> None:
    """Four images with eight captions: cut-offs up to 5 for images, up to 1 for captions."""
    image_of = np.repeat(np.arange(4), 2)
    found = measures(np.arange(4), np.zeros(8, dtype=int), image_of, np.ones((1, 4), dtype=int))
    assert set(found) == {
        "R@1",
        "i2t_R@1",
        "i2t_R@5",
        "t2i_R@1",
        "i2t_median_rank",
        "t2i_median_rank",
    }
    assert found["i2t_R@1"][0] == 25
    assert found["R@1"][0] == 62.5
    assert found["i2t_median_rank"][0] == 2.5
    assert found["t2i_median_rank"][0] == 1


def test_a_single_image_has_no_spread() -> None:
    found = standard_errors(np.array([0]), np.array([0, 0]), np.array([0, 0]))
    assert set(found.values()) == {0.0}
