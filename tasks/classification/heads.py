"""Classifiers on the features of a model: nearest neighbours, or a linear probe."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.errors import DataError
from fimaq_core.progress import OnProgress, Progress
from tasks.common import top_k
from tasks.common.data.folders import Source
from tasks.common.data.images import Images, image_outputs
from tasks.common.task import Evaluation

#: Neighbours that vote, and the temperature of their votes, as for DINO (Caron et al., ICCV 2021,
#: arXiv:2104.14294).
NEIGHBOURS, TEMPERATURE = 20, 0.07
#: Share of votes of a class that no neighbour has, so that its logarithm is finite.
_TINY = 1e-12

#: Features (B, d) to class scores (B, classes): logarithms of probabilities, float32.
Scores = Callable[[Tensor], Tensor]


def knn(bank: Tensor, labels: Tensor, classes: int) -> Scores:
    """Return a classifier by the vote of the :data:`NEIGHBOURS` nearest features of a bank.

    A neighbour at cosine similarity s has a vote of ``exp(s / TEMPERATURE)``.

    Args:
        bank: (n, d) float32 features of the training images.
        labels: (n,) int64 classes of the training images.
    """
    bank, count = F.normalize(bank, dim=1), min(NEIGHBOURS, len(bank))

    def scores(features: Tensor) -> Tensor:
        similarity, nearest = (F.normalize(features, dim=1) @ bank.T).topk(count, dim=1)
        votes = features.new_zeros(len(features), classes, dtype=torch.float64)
        weights = (similarity.double() / TEMPERATURE).softmax(1)
        return (votes.scatter_add(1, labels[nearest], weights) + _TINY).log().float()

    return scores


def linear(bank: Tensor, labels: Tensor, classes: int) -> Scores:
    """Return logistic regression on standardised features, trained on a bank; see :func:`knn`.

    Raises DataError if there is one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(labels.unique()) < classes or classes < 2:
        raise DataError("A linear classifier needs training images of all classes, two or more.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(bank.double().cpu().numpy(), labels.cpu().numpy())

    def scores(features: Tensor) -> Tensor:
        found = torch.from_numpy(probe.predict_proba(features.double().cpu().numpy()))
        return (found + _TINY).log().float().to(features.device)

    return scores


#: Makers of a classifier by name, with what a record says of it.
HEADS: dict[str, tuple[Callable[[Tensor, Tensor, int], Scores], str]] = {
    "knn": (knn, f"{NEIGHBOURS} nearest neighbours by cosine, temperature {TEMPERATURE}"),
    "linear": (linear, "logistic regression on standardised features"),
}


@dataclass(frozen=True)
class Evaluator:
    """Evaluation of features on one device; the fields are those of :meth:`.Task.evaluate`."""

    device: torch.device
    batch_size: int
    workers: int
    on_progress: OnProgress

    def measure(
        self, model: nn.Module, head: str, bank: tuple[Images, Source], test: tuple[Images, Source]
    ) -> Evaluation:
        """Measure the accuracy of a head of :data:`HEADS` on the features (B, d) of ``model``.

        ``bank`` and ``test`` are training and test images with their sources. The model itself
        makes the features of both, so a quantized model is compared with its own bank.

        Raises DataError: an image is damaged, or the classes do not fit the head.
        """
        images, source = bank
        found: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in image_outputs(model, images, self.device, self.batch_size, self.workers):
            found.append(batch.values)
            labels.append(batch.targets.to(self.device))
            self.on_progress(Progress("features", batch.done, len(images)))
        if not found:
            raise DataError(f"No image of {source.name} {source.split} could be read.")
        make, text = HEADS[head]
        scores = make(torch.cat(found), torch.cat(labels), source.classes)
        how = self.device, self.batch_size, self.workers, self.on_progress
        features: list[Tensor] = []

        def classified(x: Tensor) -> Tensor:
            features.append(model(x).float())
            return scores(features[-1])

        result = top_k.evaluate(classified, *test, *how)
        feature = torch.cat(features).cpu().numpy()
        count = sum(map(len, labels))
        note = f"head {head}: {text}, on features that this model gives for {count} images of "
        return replace(
            result,
            metrics={f"{head}_{name}": metric for name, metric in result.metrics.items()},
            outputs={**result.outputs, "feature": feature},
            notes=[*result.notes, f"{note}{source.name} {source.split}"],
        )
