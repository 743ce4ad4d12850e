"""Original images of classified samples; no model is loaded."""

from collections.abc import Sequence

from PIL import Image

from fimaq_core.errors import DataError
from tasks.classification.data import digit_pairs
from tasks.classification.tags import DEMO_NAMES
from tasks.common.data.elsewhere import folder_of
from tasks.common.data.imagenet import LAYOUT
from tasks.common.data.originals import class_originals, known_originals, originals_below
from tasks.common.request import DataRequest, ModelRequest


def originals(model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Return original images; see :meth:`tasks.common.task.Task.originals`."""
    if data.dataset is not None:
        return originals_below(folder_of(data), ids)
    if data.path is not None:
        return class_originals(data.path, ids)
    if model.name not in DEMO_NAMES:
        raise DataError(
            f"{model.name} has no data of its own: give --data /path/to/imagenet. {LAYOUT}."
        )
    source = digit_pairs("test")
    return known_originals(ids, source.ids, source.read, "the demo's digit pairs")
