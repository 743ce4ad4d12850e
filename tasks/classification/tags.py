"""Names of classifiers, their missing weights and data. Only full names import timm."""

from pathlib import Path

from tasks.common.data.elsewhere import missing_dataset
from tasks.common.data.imagenet import missing_imagenet
from tasks.common.models import timm_names
from tasks.common.models.hub import Catalogue, Repository
from tasks.common.request import DRAWN, DataRequest, Missing, ModelRequest

#: Published checkpoints by short name, with tags: timm changed what untagged names mean.
SHORT_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_large": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_base_384": "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
}

#: Metric that tables show.
MAIN_METRIC = "top1"
DEMO_NAMES = ("demo_vit", "demo_deit", "demo_swin")


def full_name(name: str) -> str:
    """Return the full timm name; see :func:`tasks.common.models.timm_names.full_name`."""
    return timm_names.full_name(name, SHORT_NAMES, DEMO_NAMES)


CATALOGUE = Catalogue(
    demo_names=DEMO_NAMES,
    demo_folder=Path(__file__).parent / "demo" / "weights",
    full_name=full_name,
    choices=lambda name: [f"{name}.{tag}" for tag in timm_names.timm_tags(name)[:8]],
    untagged="untagged names have changed their meaning",
    repository=lambda tag: Repository(f"timm/{tag}", ("model.safetensors", "pytorch_model.bin")),
)

model_tag, weights_digest = CATALOGUE.model_tag, CATALOGUE.weights_digest


def preflight(model: ModelRequest, data: DataRequest) -> list[Missing]:
    """Return the missing data and weights. Downloads nothing."""
    found = missing_data(data, model.name in DEMO_NAMES), CATALOGUE.missing_weights(model)
    return [item for item in found if item is not None]


def missing_data(data: DataRequest, brings_data: bool) -> Missing | None:
    """Return the missing data, if any; ``brings_data`` is True for demo models."""
    if (absent := missing_dataset(data)) is not None:
        return absent
    other, calibrates = data.calibration_data, data.calibration_list is None
    if other is not None and not str(other).startswith(DRAWN) and not other.is_dir():
        return Missing(f"the folder {other}", "Images to calibrate on: a folder of images.")
    return missing_imagenet(data, brings_data, calibrates=calibrates and other is None)
