"""Original images of the samples of retrieval; loads no model."""

from collections.abc import Sequence

from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.originals import class_originals, known_originals, originals_below
from tasks.common.request import DataRequest, ModelRequest
from tasks.retrieval.captions import demo_scenes, images_root
from tasks.retrieval.tags import DEMO_NAMES, LAYOUT


def originals(model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
    """See :meth:`tasks.common.task.Task.originals`. Zero-shot ids are files of the part ``val``."""
    zero_shot = data.evaluation == "zero-shot"
    if data.path is not None and zero_shot:
        return class_originals(data.path, ids)
    if data.path is not None:
        return originals_below(images_root(data.path), ids)
    if zero_shot or model.name not in DEMO_NAMES:
        what = "Zero-shot evaluation" if zero_shot else model.name
        layout = "images in class folders" if zero_shot else LAYOUT
        raise DataError(f"{what} brings no data along: give their folder with --data. {layout}.")
    source = demo_scenes("test")
    return known_originals(ids, source.image_ids, source.read, "the demo's scenes")
