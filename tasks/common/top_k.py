"""Top-1 and top-5 of a classifier, with the outcome of every sample, and its answers for a few."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fimaq_core.errors import DataError, NumericsError
from fimaq_core.progress import OnProgress, Progress
from tasks.common.cell.prediction_samples import Spread, leaders, shortened
from tasks.common.data.folders import Source
from tasks.common.data.images import Images, image_outputs
from tasks.common.record import proportion
from tasks.common.task import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    source: Source,
    device: torch.device,
    batch_size: int,
    workers: int,
    on_progress: OnProgress,
    names: Sequence[str] = (),
) -> Evaluation:
    """Measure ``model`` on all of ``images``, which came from ``source``.

    Args:
        model: on ``device``, in eval mode; (B, C, H, W) to (B, classes).
        batch_size: images per forward pass.
        workers: data-loading processes.
        on_progress: receives progress, one unit per image.
        names: of the classes, for people; their numbers where there are none.

    Raises:
        DataError: a damaged image (unless skipped), or none left.
        ModelError: the model does not take these images.
        NumericsError: a logit is NaN.
    """
    positions: list[Tensor] = []
    labels: list[Tensor] = []
    ranks: list[Tensor] = []
    predictions: list[Tensor] = []
    examples: list[dict[str, Any]] = []
    spread = Spread(len(images))
    for batch in image_outputs(model, images, device, batch_size, workers):
        logits, target = batch.values, batch.targets.to(device)
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError(
                "The model's outputs have NaN or infinite values: check the weights and the recipe."
            )
        own = logits.gather(1, target[:, None])
        # Ties count against the model: a constant output must not score.
        rank = ((logits >= own).sum(1) - 1).cpu()
        positions.append(batch.positions)
        labels.append(batch.targets)
        ranks.append(rank)
        predictions.append(logits.argmax(1).cpu())
        for row in spread.take(batch.positions.tolist()):
            example = {"sample": source.ids[int(batch.positions[row])]}
            examples.append(example | _answers(logits[row], int(batch.targets[row]), names))
        on_progress(Progress("evaluate", batch.done, len(images)))
    if not positions:
        raise DataError(f"No image of {source.name} {source.split} could be read.")
    order = torch.cat(positions).numpy()
    rank_array = torch.cat(ranks).numpy()
    count = len(order)
    metrics = {"top1": proportion(int((rank_array < 1).sum()), count)}
    if source.classes > 5:
        metrics["top5"] = proportion(int((rank_array < 5).sum()), count)
    kept = set(order.tolist())
    outcomes = {
        "sample": np.array([source.ids[index] for index in order]),
        "label": torch.cat(labels).numpy().astype(np.int32),
        "predicted": torch.cat(predictions).numpy().astype(np.int32),
        "rank": rank_array.astype(np.int32),
        "correct": rank_array < 1,
    }
    skipped = [source.ids[index] for index in range(len(images)) if index not in kept]
    notes = [*source.notes(), *images.notes()]
    measured = metrics, count, outcomes, source.describe(), skipped
    return Evaluation(*measured, examples=examples, notes=notes)


def _answers(logits: Tensor, target: int, names: Sequence[str]) -> dict[str, Any]:
    """The true class of an image and the most probable ones, from its logits (classes,)."""

    def name(label: int) -> str:
        return shortened(names[label]) if names else str(label)

    # The few numbers of a sample: double precision, so that shares do not depend on the device's softmax.
    values = logits.cpu().double()
    shares = values.softmax(0).tolist()
    best = leaders(values.numpy(), np.arange(len(values)) == target)
    return {
        "truth": name(target),
        "top": [{"name": name(label), "share": shares[label]} for label in best],
    }
