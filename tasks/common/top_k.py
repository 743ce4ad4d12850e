"""Top-1 and top-5 accuracy of a classifier, with outcomes and prediction samples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimaq_core.errors import DataError, NumericsError
from fimaq_core.progress import OnProgress, Progress
from tasks.common.cell.prediction_samples import Spread, leaders, shortened
from tasks.common.data.folders import Source
from tasks.common.data.images import Images, Outputs, image_outputs
from tasks.common.record import proportion
from tasks.common.task import Evaluation


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    images: Images,
    source: Source,
    device: torch.device,
    batch_size: int,
    workers: int,
    on_progress: OnProgress,
) -> Evaluation:
    """Measure ``model``, (B, C, H, W) to logits (B, classes), on all of ``images``.

    See :meth:`tasks.common.task.Task.evaluate`. ``images`` are those of ``source``, transformed.
    Raises DataError if no image is left or a damaged one is not skipped, ModelError if the model
    does not take these images, and NumericsError if a logit is NaN or infinite.
    """
    columns: dict[str, list[Tensor]] = {"position": [], "label": [], "predicted": [], "rank": []}
    outputs: dict[str, list[Tensor]] = {"logits": [], "feature": []}
    examples: list[dict[str, Any]] = []
    spread = Spread(len(images))
    for batch in image_outputs(model, images, device, batch_size, workers):
        logits = batch.values if source.outputs is None else batch.values[:, source.outputs]
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError(
                "The model's outputs have NaN or infinite values: check the weights and the recipe."
            )
        outputs["logits"].append(logits.cpu())
        if batch.feature is not None:
            outputs["feature"].append(batch.feature.cpu())
        right = _right(source, batch, logits.shape[1]).to(device)
        best = logits.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # Ties count against the model, so that constant outputs score nothing.
        rank = ((logits >= best) & ~right).sum(1)
        found = batch.positions, batch.targets, logits.argmax(1).cpu(), rank.cpu()
        for column, values in zip(columns.values(), found, strict=True):
            column.append(values)
        for row in spread.take(batch.positions.tolist()):
            answers = _answers(logits[row], int(batch.targets[row]), source.class_names)
            examples.append({"sample": source.ids[int(batch.positions[row])], **answers})
        on_progress(Progress("evaluate", batch.done, len(images)))
    if not columns["rank"]:
        raise DataError(f"No image of {source.name} {source.split} could be read.")
    outcomes = {name: torch.cat(parts).numpy().astype(np.int32) for name, parts in columns.items()}
    positions = outcomes.pop("position").tolist()
    outcomes = {"sample": np.array([source.ids[position] for position in positions]), **outcomes}
    outcomes["correct"] = outcomes["rank"] < 1
    metrics = {
        f"top{k}": proportion(int((outcomes["rank"] < k).sum()), len(positions))
        for k in (1, 5)
        if k == 1 or source.classes > k
    }
    skipped = [source.ids[index] for index in sorted({*range(len(images))} - {*positions})]
    notes = [*source.notes(), *images.notes()]
    measured = metrics, len(positions), outcomes, source.describe()
    raw = {name: torch.cat(parts).numpy() for name, parts in outputs.items() if parts}
    return Evaluation(*measured, raw, skipped=skipped, examples=examples, notes=notes)


def _right(source: Source, batch: Outputs, classes: int) -> Tensor:
    """Return True for the right labels of each image of a batch (B, classes)."""
    right = torch.zeros(len(batch.targets), classes, dtype=torch.bool)
    for row, position, target in zip(right, batch.positions, batch.targets, strict=True):
        row[source.answers[position] if source.answers else target] = True
    return right


def _answers(logits: Tensor, target: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the true and the most probable classes of an image from its logits (classes,)."""

    def name(label: int) -> str:
        return shortened(names[label]) if names else str(label)

    # Double precision on the CPU, so that shares do not depend on the device's softmax.
    values = logits.cpu().double()
    shares = values.softmax(0).tolist()
    best = leaders(values.numpy(), np.arange(len(values)) == target)
    top = [{"name": name(label), "share": shares[label]} for label in best]
    return {"truth": name(target), "top": top}
