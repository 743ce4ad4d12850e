"""Metrics of detectors: frame accuracy, ROC area, equal error rate, precision; video ROC area.

Frames of one video are alike, so standard errors come from a bootstrap that draws videos anew.
"""

from collections.abc import Callable

import numpy as np

from tasks.common.record import Metric

#: Draws of the bootstrap.
DRAWS = 200


class Curve:
    """Scores (n,) in groups of equal scores, ascending; ``fake`` (n,) is True for tampered ones."""

    def __init__(self, scores: np.ndarray, fake: np.ndarray) -> None:
        values, self.group = np.unique(scores, return_inverse=True)
        self.count, self.fake = len(values), fake

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights of tampered and of real samples by group."""
        parts = (weights * self.fake, weights * ~self.fake)
        fake, real = (np.bincount(self.group, part, minlength=self.count) for part in parts)
        return fake, real

    def auc(self, weights: np.ndarray) -> float:
        """Return the probability that a tampered sample beats a real one; ties count half."""
        fake, real = self.sums(weights)
        below = np.cumsum(real) - real / 2
        return float((fake * below).sum() / (fake.sum() * real.sum()))

    def auc_by_sample(self) -> np.ndarray:
        """Return contributions (n,) of the samples to :meth:`auc`, whose mean it is.

        The difference of two models on the same samples is the mean difference of these, and has
        the standard error of that mean (DeLong et al., Biometrics 44, 1988).
        """
        fake, real = self.sums(np.ones(len(self.group)))
        below = (np.cumsum(real) - real / 2) / real.sum()
        above = 1 - (np.cumsum(fake) - fake / 2) / fake.sum()
        place = np.where(self.fake, below[self.group], above[self.group])
        count = np.where(self.fake, fake.sum(), real.sum())
        whole = self.auc(np.ones(len(place)))
        return whole + len(place) * (place - whole) / count

    def eer(self, weights: np.ndarray) -> float:
        """Return the rate at which as many real samples are accused as tampered ones are missed.

        Between two thresholds the ROC curve is a straight line.
        """
        fake, real = self.sums(weights)
        missed = np.concatenate([[0.0], np.cumsum(fake) / fake.sum()])
        accused = np.concatenate([[1.0], 1 - np.cumsum(real) / real.sum()])
        after = int(np.argmax(missed >= accused))
        gap = accused - missed
        share = gap[after - 1] / (gap[after - 1] - gap[after])
        return float(missed[after - 1] + share * (missed[after] - missed[after - 1]))

    def precision(self, weights: np.ndarray) -> float:
        """Return the average precision: the sum of precisions times steps of recall."""
        fake, real = (np.cumsum(part[::-1]) for part in self.sums(weights))
        steps = np.diff(fake, prepend=0) / fake[-1]
        found = fake + real
        return float((steps * fake / np.where(found > 0, found, 1)).sum())


def measures(probability: np.ndarray, fake: np.ndarray, video: np.ndarray) -> dict[str, Metric]:
    """Return all metrics in percent with their standard errors.

    Args:
        probability: (n,) of being tampered, of each frame.
        fake: (n,) True for frames of tampered videos.
        video: (n,) number of each frame's video, from 0 without gaps.
    """
    count = np.bincount(video)
    frames = Curve(probability, fake)
    whole = Curve(np.bincount(video, probability) / count, np.bincount(video, fake) > 0)
    right = (probability > 0.5) == fake
    of_frames: dict[str, Callable[[np.ndarray], float]] = {
        "frame_auc": frames.auc,
        "frame_accuracy": lambda weights: float((weights * right).sum() / weights.sum()),
        "frame_eer": frames.eer,
        "frame_ap": frames.precision,
    }

    def each(drawn: np.ndarray) -> dict[str, float]:
        found = {name: 100 * metric(drawn[video]) for name, metric in of_frames.items()}
        return found | {"video_auc": 100 * whole.auc(drawn)}

    values, generator = each(np.ones(len(count))), np.random.default_rng(0)
    draws = []
    while len(draws) < DRAWS:
        drawn = np.bincount(generator.integers(0, len(count), len(count)), minlength=len(count))
        if (drawn * whole.fake).any() and (drawn * ~whole.fake).any():
            draws.append(each(drawn.astype(float)))
    return {
        name: Metric(value=value, stderr=float(np.std([one[name] for one in draws], ddof=1)))
        for name, value in values.items()
    }
