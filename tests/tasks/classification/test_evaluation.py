"""Accuracy against a loop; ties and constant outputs do not score."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fimaq_core.errors import ModelError, NumericsError
from fimaq_core.progress import Progress, silent
from tasks.common.data.folders import Source
from tasks.common.data.images import Images
from tasks.common.task import Evaluation
from tasks.common.top_k import evaluate

CPU = torch.device("cpu")


class Table(nn.Module):
    """Gives the logits that are written in the image: pixel values of its only channel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.classes]


def measure(
    logits: Tensor, targets: list[int], batch: int = 7, model: nn.Module | None = None
) -> Evaluation:
    """Evaluate a table of logits (n, classes)."""
    count, classes = logits.shape
    source = Source(
        "table",
        "val",
        [f"s{i}" for i in range(count)],
        targets,
        classes,
        lambda _: Image.new("L", (1, 1)),
    )
    images = Images(
        source.ids, targets, lambda index: index, lambda index: logits[index].view(1, 1, -1), False
    )  # type: ignore[arg-type, return-value]
    return evaluate(model or Table(classes), images, source, CPU, batch, 0, silent)


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("classes", [3, 5, 6, 20])
def test_metrics_against_a_loop(batch: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(60, classes, generator=generator).round(decimals=1)  # some ties
    targets = torch.randint(0, classes, (60,), generator=generator).tolist()
    logits[torch.arange(0, 60, 2), targets[::2]] += 2
    result = measure(logits, targets, batch)
    top1 = top5 = 0
    for row, target in zip(logits.tolist(), targets, strict=True):
        at_least = sum(value >= row[target] for number, value in enumerate(row) if number != target)
        top1 += at_least < 1
        top5 += at_least < 5
    assert 0 < top1 < 60
    assert result.n == 60
    assert result.metrics["top1"].value == pytest.approx(100 * top1 / 60)
    share = top1 / 60
    assert result.metrics["top1"].stderr == pytest.approx(100 * (share * (1 - share) / 60) ** 0.5)
    if classes > 5:
        assert result.metrics["top5"].value == pytest.approx(100 * top5 / 60)
    else:
        assert "top5" not in result.metrics
    assert result.outcomes["correct"].sum() == top1
    assert result.outcomes["sample"].tolist() == [f"s{i}" for i in range(60)]
    assert result.outcomes["label"].tolist() == targets
    assert np.array_equal(result.outcomes["correct"], result.outcomes["rank"] == 0)
    assert result.skipped == []


def test_constant_outputs_do_not_score() -> None:
    """argmax of equal logits is class 0: a broken model would score on every sample of it."""
    for value in (0.0, 3.5):
        result = measure(torch.full((10, 8), value), [0] * 10)
        assert result.metrics["top1"].value == 0
        assert result.metrics["top5"].value == 0


def test_a_tie_of_two_does_not_score() -> None:
    logits = torch.zeros(2, 6)
    logits[:, 2:4] = 1
    result = measure(logits, [2, 3])
    assert result.metrics["top1"].value == 0
    assert result.metrics["top5"].value == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(value: float) -> None:
    logits = torch.randn(20, 6)
    logits[13, 2] = value
    with pytest.raises(NumericsError, match="NaN or infinite"):
        measure(logits, [0] * 20)


def test_images_that_do_not_fit_the_model_are_explained() -> None:
    with pytest.raises(ModelError, match=r"does not take images of shape \(1, 1, 6\)"):
        measure(torch.randn(4, 6), [0] * 4, model=nn.Conv2d(3, 4, 1))


def test_progress_counts_images() -> None:
    seen: list[Progress] = []
    logits = torch.randn(10, 6)
    source = Source(
        "table", "val", [f"s{i}" for i in range(10)], [0] * 10, 6, lambda _: Image.new("L", (1, 1))
    )
    images = Images(source.ids, [0] * 10, lambda i: i, lambda i: logits[i].view(1, 1, -1), False)
    evaluate(Table(6), images, source, CPU, 4, 0, seen.append)
    assert [event.done for event in seen] == [4, 8, 10]
    assert {event.total for event in seen} == {10}
