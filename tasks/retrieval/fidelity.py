"""Fidelity of rankings: how close retrieval with a quantized model is to full precision.

``overlap@10`` is the percentage of the 10 best candidates in full precision that are among the 10
best of the quantized model. ``kendall`` is Kendall's tau-b between both models' scores of the 50
candidates that are best in full precision. Both are means over the two directions. ``cosine`` is
that of a query's own embedding.
"""

import numpy as np
from scipy.stats import kendalltau

from tasks.common.fidelity import UNITS, Fidelity, RawOutputs, clustered_error, cosines
from tasks.common.record_entries import SignedMetric

#: Numbers of candidates for the overlap and for Kendall's tau.
NEAREST, RANKED = 10, 50


def ranking_fidelity(full: RawOutputs, own: RawOutputs, cluster: np.ndarray) -> Fidelity:
    """Compare unit embeddings ``image`` (n, d) and ``caption`` (m, d) with full precision.

    ``cluster`` (n + m,) is the image of each query, images first.
    """
    sides = ("image", "caption"), ("caption", "image")
    found = [_direction(full, own, query, other) for query, other in sides]
    count = len(full["image"])
    owner = np.searchsorted(cluster[:count], cluster[count:])
    outcomes, metrics = {}, {}
    for name in found[0]:
        first, second = (side[name] for side in found)
        scale = 1 if name in UNITS else 100
        error = scale * clustered_error(first, second, owner)
        metrics[name] = SignedMetric(
            value=scale * float(first.mean() + second.mean()) / 2, stderr=error
        )
        outcomes[name] = np.concatenate([first, second]).astype(np.float32)
    return Fidelity(metrics, outcomes)


def _direction(full: RawOutputs, own: RawOutputs, query: str, other: str) -> dict[str, np.ndarray]:
    """Return one value per query of each figure."""
    overlap, tau = [], []
    nearest, ranked = (min(k, len(full[other])) for k in (NEAREST, RANKED))
    for f, q in zip(full[query], own[query], strict=True):
        scores = full[other] @ f, own[other] @ q
        best = [np.argsort(-one, kind="stable") for one in scores]
        overlap.append(len({*best[0][:nearest]} & {*best[1][:nearest]}) / nearest)
        rows = best[0][:ranked]
        tau.append(kendalltau(scores[0][rows], scores[1][rows]).statistic)
    # Tau is not defined where all scores of a model are equal: then nothing of the order is left.
    return {
        f"overlap@{NEAREST}": np.array(overlap),
        "kendall": np.nan_to_num(np.array(tau)),
        "cosine": cosines(full[query], own[query]),
    }
