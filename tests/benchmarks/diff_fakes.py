"""Records that may be compared with published numbers: the right data, weights and calibration."""

from typing import Any

from benchmark_fakes import IMAGENET, make_record

from benchmarks.compare.alike import published_rows
from benchmarks.grid.names import load_names
from fimaq_core.recipe import Recipe
from tasks.common.preprocessing import Preprocessing
from tasks.common.record import Calibration, Metric, ResultRecord

_ROWS = published_rows()
_FULL = _ROWS[(_ROWS["method"] == "FP") & (_ROWS["variant"] == "")]
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_SIZE = {"input_size": (3, 224, 224), "interpolation": "bicubic"}
_CENTER = {**_SIZE, "crop_pct": 0.9, "crop_mode": "center"}
#: The preprocessing of checkpoints, by its name in ``names.yaml``.
PREPROCESSING = {
    "augreg": Preprocessing(**_CENTER, **_HALF),
    "imagenet": Preprocessing(**_CENTER, **_IMAGENET),
    "imagenet-384": Preprocessing(
        **{**_CENTER, "input_size": (3, 384, 384), "crop_pct": 1.0}, **_IMAGENET
    ),
    "clip": Preprocessing(**_SIZE, crop_mode="shortest", **_CLIP),
    "siglip": Preprocessing(**_SIZE, crop_mode="squash", **_HALF),
}


def calibrated(recipe: Recipe | None, dataset: str, split: str, **changes: Any) -> Any:
    """The calibration that the recipe asks for, on a part of a data set."""
    if recipe is None:
        return None
    usual = {
        "ids": [f"{split}/{recipe.seed}-{number}" for number in range(recipe.calibration_images)],
        "transform": recipe.calibration_transform,
        "fingerprint": "c",
        "dataset": dataset,
        "split": split,
        "listed": False,
    }
    return Calibration(**{**usual, **changes})


def full_precision(model: str) -> dict[str, Metric]:
    """The published metrics of a model in full precision, by the metrics' names here."""
    names = [name for name, entry in load_names().models.items() if entry.tag == model]
    rows = _FULL[_FULL["model"].isin(names)].sort_values("evidence", ascending=False)
    pairs = zip(rows["metric"], rows["value"], strict=True)
    return {name: Metric(value=value, stderr=0.2) for name, value in pairs}


def published_record(
    recipe: Recipe | None, model: str, calibration: dict[str, Any] | None = None, **changes: Any
) -> ResultRecord:
    """A record on ImageNet like those of papers; ``calibration`` are changes to its images."""
    data, entries = changes.get("dataset", IMAGENET), load_names().models_for(model)
    sets = load_names().published_on(changes.get("task", "classification"), data.name)
    part = sets[0][2].calibration if sets else None
    place = (part.name, part.split) if part else (data.name, "train")
    kind = entries[0].preprocessing if entries else None
    usual = {
        "recipe": recipe,
        "model": model,
        "dataset": data,
        "fp_metrics": full_precision(model),
        "calibration": calibrated(recipe, *place, **(calibration or {})),
        "preprocessing": PREPROCESSING.get(kind or ""),
    }
    return make_record(**{**usual, **changes})
