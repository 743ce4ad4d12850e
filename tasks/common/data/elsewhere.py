"""Names of data sets and corruptions to evaluate on. The import is fast.

Such an evaluation takes the model that is quantized at home: with the training part of the data
folder, or with other calibration data.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fimaq_core.documents import clipped
from fimaq_core.errors import DataError, suggest
from tasks.common.request import DataRequest, Missing

#: Corruptions of ImageNet-C (Hendrycks and Dietterich, 2019); the last four are for validation.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
SEVERITIES = ("1", "2", "3", "4", "5")
#: Start of the names of the parts of ImageNet-C, such as ``imagenet-c:gaussian_noise:3``.
IMAGENET_C = "imagenet-c"
#: The images of ImageNet's part ``val`` with other labels (Beyer et al., 2020).
REAL = "imagenet-real"
OBJECTNET = "objectnet"
#: Data sets whose images may have several right labels.
SEVERAL = (REAL, OBJECTNET)
#: Names of data sets on the command line and in records.
TITLES = {
    "imagenet-v2-matched-frequency": "ImageNet-V2 matched-frequency",
    "imagenet-v2-threshold0.7": "ImageNet-V2 threshold0.7",
    "imagenet-v2-top-images": "ImageNet-V2 top-images",
    "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R",
    "imagenet-sketch": "ImageNet-Sketch",
    REAL: "ImageNet-1k val, ReaL labels",
    OBJECTNET: "ObjectNet",
}
DATASET_HELP = (
    f"Evaluate an ImageNet classifier on this data set: {', '.join(TITLES)} or "
    f"{IMAGENET_C}:CORRUPTION:SEVERITY. Its folder is --data, or FOLDER in NAME=FOLDER."
)
CORRUPT_HELP = (
    "Corrupt the images of the evaluation, such as gaussian_noise:3. Names: "
    f"{', '.join(CORRUPTIONS)}; severities: 1 to 5."
)


class Elsewhere(NamedTuple):
    """A data set other than that of the data folder."""

    name: str  # key of TITLES, or imagenet-c:CORRUPTION:SEVERITY
    folder: Path | None  # None: the data folder

    @property
    def title(self) -> str:
        """Name in records."""
        start, _, corruption = self.name.partition(":")
        return f"ImageNet-C, {corruption}" if start == IMAGENET_C else TITLES[self.name]


def read_dataset(text: str) -> Elsewhere:
    """Return the data set of ``NAME`` or ``NAME=FOLDER``. Raises DataError."""
    name, _, folder = text.partition("=")
    start, _, corruption = name.partition(":")
    if start == IMAGENET_C:
        read_corruption(corruption)
    elif name not in TITLES:
        known = [*TITLES, f"{IMAGENET_C}:CORRUPTION:SEVERITY"]
        hint = suggest(clipped(name), known)
        raise DataError(f"There is no data set '{clipped(name)}'.{hint}")
    return Elsewhere(name, Path(folder).expanduser() if folder else None)


def read_corruption(text: str) -> tuple[str, int]:
    """Return name and severity of ``NAME:SEVERITY``, such as ``gaussian_noise:3``. DataError."""
    name, _, severity = text.partition(":")
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise DataError(
            f"There is no corruption '{clipped(text)}': give NAME:SEVERITY with a severity from 1 "
            f"to 5 and one of the names {', '.join(CORRUPTIONS)}."
        )
    return name, int(severity)


def corruption_of(title: str) -> tuple[str, str, str] | None:
    """Split the name of a corrupted data set in a record: data set, corruption, severity."""
    found = re.fullmatch(rf"(.+), ({'|'.join(CORRUPTIONS)}):([1-5])", title)
    return None if found is None else (found[1], found[2], found[3])


def settled(data: DataRequest) -> DataRequest:
    """Return the request in its only form: a data set has its folder; the data folder is home.

    With ``--data``, the home of ReaL labels is that folder, and the home of other data sets is the
    calibration data. Raises DataError for an unknown data set or corruption.
    """
    if data.corrupt is not None:
        read_corruption(data.corrupt)
    if data.dataset is None:
        return data
    found = read_dataset(data.dataset)
    if found.folder is not None or data.path is None:
        return data
    whole = replace(data, dataset=f"{found.name}={data.path}")
    if found.name == REAL:
        return whole
    return replace(whole, path=data.calibration_data, calibration_data=None)


def at_home(data: DataRequest) -> DataRequest:
    """Return the settled request without other data set and corruption. Raises DataError."""
    if data.dataset is not None and data.path is None:
        raise DataError(
            f"{read_dataset(data.dataset).title} has no images to calibrate on: give the folder of "
            "ImageNet with --calibration-data."
        )
    return replace(data, dataset=None, corrupt=None)


def folder_of(data: DataRequest) -> Path:
    """Return the folder of the data set of a request that names one. Raises DataError."""
    found = read_dataset(data.dataset or "")
    if (folder := found.folder or data.path) is None:
        raise DataError(f"{found.title} needs its folder: give --dataset {found.name}=/path.")
    return folder


def missing_dataset(data: DataRequest) -> Missing | None:
    """Return the folder of the data set that a request names, if it is missing."""
    if data.dataset is None or (folder := folder_of(data)).is_dir():
        return None
    return Missing(f"the folder {folder}", "Give the folder of a data set as NAME=FOLDER.")
