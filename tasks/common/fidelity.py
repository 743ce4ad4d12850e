"""Fidelity: how close a quantized model's outputs are to those in full precision, without labels.

Figures of classifiers, from logits f in full precision and q quantized, with p = softmax:

- ``kl``: KL(p(f) || p(q)) in nats, the mean over samples.
- ``agreement``: percentage of samples with the same most probable class.
- ``right_to_wrong``, ``wrong_to_right``: percentage of samples whose answer became wrong, or right.
  As in top-1 accuracy, an answer is right if no other class has a logit as large.
- ``snr_db``: 10 log10(Σ f² / Σ (q - f)²) over all samples, with each sample's logits minus their
  mean, since softmax does not see a constant.
- ``cosine``: mean cosine of the penultimate features.
- ``nll`` (nats), ``brier`` (Σ over classes of squared errors), ``ece`` (percent): calibration of
  the probabilities, with ``fp_`` before the name for full precision. ``ece`` is the mean over 15
  bins with equal numbers of samples, by confidence, of |accuracy - confidence| (Nixon et al., CVPR
  Workshops 2019, arXiv:1904.01685; expected calibration error of Guo et al., ICML 2017).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tasks.common.record_entries import SignedMetric

#: Bins of the calibration error; draws of the bootstrap for its standard error.
BINS, DRAWS = 15, 200
#: Samples whose probabilities are computed at the same time.
_ROWS = 4096
#: Units of figures that are no percentages.
UNITS = {"kl": "nats", "nll": "nats", "brier": "", "cosine": "", "kendall": "", "snr_db": "dB"}
UNITS |= {f"fp_{name}": unit for name, unit in UNITS.items()}
#: Figures that are better if they are lower.
LOWER = ("kl", "right_to_wrong", "nll", "brier", "ece")

#: Figures of classifiers that use no labels.
WITHOUT_LABELS = ("kl", "agreement", "snr_db", "cosine")

#: Raw outputs of samples by name, see :attr:`tasks.common.task.Evaluation.outputs`.
RawOutputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fidelity:
    """Figures of fidelity, and their values for single samples."""

    metrics: dict[str, SignedMetric] = field(default_factory=dict)
    #: Columns (n,) for the outcomes: shares of 1 for percentages, else in the figure's unit.
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)

    def without_labels(self) -> "Fidelity":
        """Return the figures of a classifier that use no labels."""
        parts = (self.metrics, self.outcomes)
        return Fidelity(*({k: own[k] for k in WITHOUT_LABELS if k in own} for own in parts))


def classifier_fidelity(
    full: RawOutputs, own: RawOutputs, labels: np.ndarray, *, cluster: np.ndarray | None = None
) -> Fidelity:
    """Compare ``logits`` (n, classes) and, if both have it, ``feature`` (n, d) with full precision.

    ``labels`` (n,) are the true classes. A label outside the classes makes no answer right.
    ``cluster`` (n,) is equal for dependent samples, such as frames of one video, whose standard
    errors are larger; None: all samples are independent.
    """
    columns: dict[str, list[np.ndarray]] = {}
    pairs = full["logits"], own["logits"]
    for first in range(0, len(labels), _ROWS):
        rows = slice(first, first + _ROWS)
        for name, values in _columns(*(one[rows] for one in pairs), labels[rows]).items():
            columns.setdefault(name, []).append(values)
    each = {name: np.concatenate(parts) for name, parts in columns.items()}
    signal, noise = each.pop("signal"), each.pop("noise")
    confidence = {"": each.pop("confidence"), "fp_": each.pop("fp_confidence")}
    right = {"": each.pop("right"), "fp_": each.pop("fp_right")}
    if "feature" in full and "feature" in own:
        each["cosine"] = cosines(full["feature"], own["feature"])
    metrics = {name: mean_of(name, values, cluster=cluster) for name, values in each.items()}
    metrics["snr_db"] = decibels(signal, noise, cluster=cluster)
    for start in ("", "fp_"):
        sides = confidence[start], right[start]
        metrics[f"{start}ece"] = calibration_error(*sides, cluster=cluster)
    kept = (name for name in each if not name.startswith("fp_"))
    whole = {k: each[k].astype(np.float32) for k in kept if not np.isnan(each[k]).any()}
    return Fidelity(metrics, whole)


def _columns(full: np.ndarray, own: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return one value per sample of each figure, float64."""
    from scipy.special import log_softmax  # slow to import

    f, q = full.astype(np.float64), own.astype(np.float64)
    f, q = (x - x.mean(axis=1, keepdims=True) for x in (f, q))
    log_f, log_q = (log_softmax(x, axis=1) for x in (f, q))
    p_f, p_q = np.exp(log_f), np.exp(log_q)
    known = (labels >= 0) & (labels < f.shape[1])
    rows, place = np.arange(len(labels)), np.where(known, labels, 0)
    answers = [x.argmax(axis=1) for x in (f, q)]
    # Ties count against a model, as in top-1 accuracy.
    right_f, right_q = (known & ((x >= x[rows, place, None]).sum(axis=1) == 1) for x in (f, q))

    def errors(p: np.ndarray, log_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nll = np.where(known, -log_p[rows, place], np.nan)
        brier = (p**2).sum(axis=1) + known * (1 - 2 * p[rows, place])
        return nll, brier

    (nll, brier), (fp_nll, fp_brier) = errors(p_q, log_q), errors(p_f, log_f)
    return {
        "kl": (p_f * (log_f - log_q)).sum(axis=1),
        "agreement": answers[0] == answers[1],
        "right_to_wrong": right_f & ~right_q,
        "wrong_to_right": ~right_f & right_q,
        "nll": nll, "brier": brier, "fp_nll": fp_nll, "fp_brier": fp_brier,
        "signal": (f**2).sum(axis=1), "noise": ((q - f) ** 2).sum(axis=1),
        "confidence": p_q.max(axis=1), "right": right_q,
        "fp_confidence": p_f.max(axis=1), "fp_right": right_f,
    }  # fmt: skip


def mean_of(name: str, values: np.ndarray, *, cluster: np.ndarray | None = None) -> SignedMetric:
    """Return the mean of values (n,) of samples without NaN, in percent if the figure is one.

    ``cluster`` (n,) is that of :func:`classifier_fidelity`.
    """
    values = (1 if name in UNITS else 100) * values.astype(np.float64)
    known = ~np.isnan(values)
    values, cluster = values[known], None if cluster is None else cluster[known]
    mean = float(values.mean()) if len(values) else 0.0
    return SignedMetric(value=mean, stderr=_standard_error(values, cluster))


def _standard_error(values: np.ndarray, cluster: np.ndarray | None) -> float:
    """Return the standard error of the mean of values (n,) of samples in G clusters.

    It is cluster-robust (Liang and Zeger, Biometrika 73, 1986): √(G/(G-1) Σs²)/n, where s is the
    sum of the deviations from the mean in a cluster. For independent samples it is sd/√n.
    """
    if len(values) < 2:
        return 0.0
    sums = np.bincount(_owner(cluster, len(values)), values - values.mean())
    groups = len(sums)
    return (
        math.sqrt(groups / (groups - 1) * float(sums @ sums)) / len(values) if groups > 1 else 0.0
    )


def _owner(cluster: np.ndarray | None, count: int) -> np.ndarray:
    """Return the cluster of each sample (count,), numbered from 0 without gaps."""
    return np.arange(count) if cluster is None else np.unique(cluster, return_inverse=True)[1]


def cosines(full: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the cosines (n,) of features (n, d); 0 for a feature of zeros."""
    f, q = full.astype(np.float64), own.astype(np.float64)
    lengths = np.linalg.norm(f, axis=1) * np.linalg.norm(q, axis=1)
    found: np.ndarray = (f * q).sum(axis=1) / np.where(lengths > 0, lengths, 1)
    return found


def decibels(
    signal: np.ndarray, noise: np.ndarray, *, cluster: np.ndarray | None = None
) -> SignedMetric:
    """Return the signal-to-noise ratio of sums over samples (n,) in dB; at most 200 dB.

    The standard error follows from the variances of both sums (delta method). ``cluster`` (n,) is
    that of :func:`classifier_fidelity`.
    """
    most = 200.0
    a, b = signal.mean(), noise.mean()
    if a <= 0 or b <= a * 10 ** (-most / 10):
        return SignedMetric(value=most if a > 0 or b <= 0 else -most, stderr=0.0)
    error = _standard_error(signal / a - noise / b, cluster)
    return SignedMetric(value=10 * math.log10(a / b), stderr=10 / math.log(10) * error)


def calibration_error(
    confidence: np.ndarray, right: np.ndarray, *, cluster: np.ndarray | None = None
) -> SignedMetric:
    """Return the expected calibration error in percent, from values (n,); see the module.

    The standard error is that of a bootstrap over the clusters of :func:`classifier_fidelity`, with
    the bins of the whole data.
    """
    order = np.argsort(confidence, kind="stable")
    gaps = 100 * (right[order].astype(np.float64) - confidence[order])
    bins = np.arange(len(gaps)) * min(BINS, len(gaps)) // len(gaps)

    def error(counts: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins, counts * gaps)).sum() / counts.sum())

    owner = _owner(None if cluster is None else cluster[order], len(gaps))
    generator, n = np.random.default_rng(0), len(gaps)
    groups = int(owner.max()) + 1
    draws = (generator.integers(0, groups, groups) for _ in range(DRAWS))
    spread = np.std([error(np.bincount(d, minlength=groups)[owner]) for d in draws], ddof=1)
    return SignedMetric(value=error(np.ones(n)), stderr=float(spread))


def clustered_error(first: np.ndarray, second: np.ndarray, owner: np.ndarray) -> float:
    """Return the standard error of the mean of two means, over images with their captions.

    ``first`` (n,) has one value per image, ``second`` (m,) one per caption of image ``owner`` (m,).
    """
    n, m = len(first), len(second)
    parts = np.bincount(owner, second - second.mean(), minlength=n) * n / m
    moved = (first - first.mean() + parts) / 2
    return float(moved.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
