"""Names of detectors, files of COCO 2017 (Lin et al., ECCV 2014), and missing weights and data."""

from itertools import combinations
from pathlib import Path
from typing import Any

from fimaq_core.errors import ModelError, suggest
from tasks.common.models.hub import Catalogue
from tasks.common.request import DataRequest, Missing, ModelRequest

#: Splits of COCO 2017 by part. The published numbers are on ``val2017``.
SPLITS = {"train": "train2017", "val": "val2017"}

LAYOUT = (
    "The folder of COCO 2017 is expected, with annotations/instances_val2017.json and val2017/ "
    "(5,000 images), and annotations/instances_train2017.json and train2017/ to calibrate on; or a "
    "file of annotations in COCO's format, whose name ends in .json, with the images beside it"
)

#: By training (36 or 12 epochs on COCO), release and file name of the published weights.
_FILES = {"coco_3x": "v1.0.2/{}_patch4_window7.pth", "coco_1x": "v1.0.3/{}_patch4_window7_1x.pth"}
_TRAININGS: dict[str, tuple[str, ...]] = {
    "mask_rcnn_swin_tiny": ("coco_3x", "coco_1x"),
    "mask_rcnn_swin_small": ("coco_3x",),
    "mask_rcnn_swin_base": (),
    "cascade_mask_rcnn_swin_tiny": ("coco_3x", "coco_1x"),
    "cascade_mask_rcnn_swin_small": ("coco_3x",),
    "cascade_mask_rcnn_swin_base": ("coco_3x",),
}
#: By model and training: the published file.
PUBLISHED: dict[str, dict[str, str]] = {
    model: {tag: _FILES[tag].format(model) for tag in tags} for model, tags in _TRAININGS.items()
}

#: Full name by short name: the weights of 36 epochs, or no tag if none were published.
SHORT_NAMES = {
    model: f"{model}.coco_3x" if "coco_3x" in tags else model for model, tags in PUBLISHED.items()
}

#: Metric that tables show.
MAIN_METRIC = "AP_box"
DEMO_NAMES = ("demo_mask_rcnn", "demo_cascade")

#: Pieces of a detector. A scope joins any of them; the first scope, with all, is the usual one.
PIECES = ("backbone", "fpn", "rpn", "roi")
SCOPES = tuple("+".join(pieces) for count in (4, 3, 2, 1) for pieces in combinations(PIECES, count))

#: Settings of recipes for detectors: few large images of varying sizes, run one by one.
DEFAULTS: dict[str, Any] = {
    "calibration_images": 256,
    "calibration_transform": "eval",
    "batch_size": 1,
    "mlp_batch": 1,
    "range_images": 1,
    "mlp_percentile": 0.999,
}


def parts(scope: str | None) -> dict[str, str]:
    """Chains of a scope that take long, without the RoI heads, which take seconds."""
    pieces = [name for name in (scope or SCOPES[0]).split("+") if name != "roi"]
    return {"detector": "+".join(pieces)} if pieces else {}


def full_name(name: str) -> str:
    """Return ``<model>.<tag>``, or the name of a model without weights. Raises ModelError."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    model, _, tag = name.partition(".")
    if model not in PUBLISHED:
        raise ModelError(f"Unknown model '{name}'.{suggest(name, [*SHORT_NAMES, *DEMO_NAMES])}")
    if tag not in PUBLISHED[model]:
        known = " There are none: give a file with --weights."
        known = suggest(tag, PUBLISHED[model]) if PUBLISHED[model] else known
        raise ModelError(f"There are no published weights '{tag}' of {model}.{known}")
    return name


CATALOGUE = Catalogue(
    demo_names=DEMO_NAMES,
    demo_folder=Path(__file__).parent / "demo" / "weights",
    full_name=full_name,
    choices=lambda name: [f"{name}.{tag}" for tag in PUBLISHED[name]],
    untagged="none were published for it",
    repository=lambda tag: None,
)

model_tag, weights_digest = CATALOGUE.model_tag, CATALOGUE.weights_digest


def preflight(model: ModelRequest, data: DataRequest) -> list[Missing]:
    """List missing data and weights. Downloads nothing."""
    found = [missing_data(data, model.name in DEMO_NAMES), missing_weights(model)]
    return [item for item in found if item is not None]


def missing_weights(model: ModelRequest) -> Missing | None:
    """Describe missing weights. Published weights are not downloaded, since no hub has them."""
    found = CATALOGUE.missing_weights(model)
    if found is None or model.name in DEMO_NAMES:
        return found
    name, _, tag = full_name(model.name).partition(".")
    return Missing(
        f"the weights of {name}.{tag} (published as {PUBLISHED[name][tag]})",
        "No Hugging Face repository has them. Get the file from "
        "https://github.com/SwinTransformer/storage/releases and give it with --weights, or put "
        "it, named <name>.pth, into the folder of weights: WEIGHTS=/path for make, --weights for "
        "a grid, --weights-folder for an adapter.",
    )


def missing_data(data: DataRequest, brings_data: bool) -> Missing | None:
    """Describe missing data to measure on or to calibrate on."""
    if data.path is None and data.calibration_data is None:
        advice = f"Give its folder: COCO=/path for make, --data for an adapter. {LAYOUT}."
        return None if brings_data else Missing("the data set COCO 2017", advice)
    lacking = [] if data.path is None else absent(data.path, "val")
    source = data.calibration_data or data.path
    # An annotation file to measure on lists no images to calibrate on, but not all runs calibrate.
    if source is not None and (data.calibration_data is not None or source.suffix != ".json"):
        lacking += absent(source, "train")
    if data.path is None and not brings_data:
        lacking.insert(0, "the data set COCO 2017")
    return Missing(" and ".join(dict.fromkeys(lacking)), f"{LAYOUT}.") if lacking else None


def annotation_file(root: Path, part: str) -> Path:
    """Path of the annotation file of a part (``train`` or ``val``) of COCO 2017."""
    return root / "annotations" / f"instances_{SPLITS[part]}.json"


def absent(path: Path, part: str) -> list[str]:
    """List what is missing of a part at a path: ``the folder ...`` or ``the file ...`` each."""
    if path.suffix == ".json":
        return [] if path.is_file() else [f"the file {path}"]
    if not path.is_dir():
        return [f"the folder {path}"]
    wanted, folder = annotation_file(path, part), path / SPLITS[part]
    found = [] if wanted.is_file() else [f"the file {wanted}"]
    return found + ([] if folder.is_dir() else [f"the folder {folder}"])
