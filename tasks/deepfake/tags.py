"""Names of detectors and data sets, missing weights and data. Only full names import timm."""

from pathlib import Path

from tasks.common.models import timm_names
from tasks.common.models.hub import Catalogue
from tasks.common.request import DataRequest, Missing, ModelRequest

#: Backbones by short name. The weights are those of a trained detector, so they are always local.
SHORT_NAMES = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "clip_vit_b16": "vit_base_patch16_clip_224",
    "clip_vit_l14": "vit_large_patch14_clip_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
#: Metric that tables show.
MAIN_METRIC = "frame_auc"
DEMO_NAMES = ("demo_deepfake",)
#: Set that the models are trained and calibrated on, with its compression.
TRAINED_ON, COMPRESSION = "FaceForensics++", "c23"
#: Sets to evaluate on, by the names of their index files; the default first.
EVALUATIONS = (
    TRAINED_ON, "FF-DF", "FF-F2F", "FF-FS", "FF-NT", "FaceShifter", "DeepFakeDetection", "DFDC",
    "DFDCP", "Celeb-DF-v1", "Celeb-DF-v2", "UADFV",
)  # fmt: skip
#: Recipe fields of every method. Augmentation would add traces of its own.
DEFAULTS = {"calibration_transform": "eval"}
LAYOUT = (
    "Data folder with dataset_json/<Set>.json of DeepfakeBench and the frames that these files name"
)


def full_name(name: str) -> str:
    """Return the full timm name; see :func:`tasks.common.models.timm_names.full_name`."""
    return timm_names.full_name(name, SHORT_NAMES, DEMO_NAMES)


CATALOGUE = Catalogue(
    demo_names=DEMO_NAMES,
    demo_folder=Path(__file__).parent / "demo" / "weights",
    full_name=full_name,
    choices=lambda name: [],
    untagged="no detector is published under a timm name",
    repository=lambda tag: None,
)
model_tag, weights_digest = CATALOGUE.model_tag, CATALOGUE.weights_digest


def index_file(root: Path, name: str) -> Path:
    """Return the path of the index of a set."""
    return root / "dataset_json" / f"{name}.json"


def preflight(model: ModelRequest, data: DataRequest) -> list[Missing]:
    """Return the missing data and weights."""
    found = missing_data(data, model.name in DEMO_NAMES), CATALOGUE.missing_weights(model)
    return [item for item in found if item is not None]


def missing_data(data: DataRequest, brings_data: bool) -> Missing | None:
    """Return the missing indices of the evaluated set, and of the one to calibrate on."""
    if data.path is None:
        advice = f"Give its folder with --data. {LAYOUT}."
        return None if brings_data else Missing("the deepfake data", advice)
    wanted = [index_file(data.path, data.evaluation or TRAINED_ON)]
    if data.calibration_list is None:
        wanted.append(index_file(data.calibration_data or data.path, TRAINED_ON))
    absent = [str(path) for path in dict.fromkeys(wanted) if not path.is_file()]
    return Missing(f"the file {' and the file '.join(absent)}", f"{LAYOUT}.") if absent else None
