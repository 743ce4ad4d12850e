"""Original images of detection's samples; loads no model."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.originals import known_originals
from tasks.common.request import DataRequest, ModelRequest
from tasks.detection.coco import open_part
from tasks.detection.tags import DEMO_NAMES, LAYOUT


def originals(model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Open original images, turned so that boxes fit; see ``tasks.common.task.Task.originals``."""
    if data.path is None and model.name not in DEMO_NAMES:
        raise DataError(f"{model.name} brings no data along: give --data /path/to/coco. {LAYOUT}.")
    source = open_part(data.path, "val", data.exif)

    def read(index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(source.read(index)[:, :, ::-1]))

    return known_originals(ids, source.image_ids, read, f"{source.name} {source.split}")
