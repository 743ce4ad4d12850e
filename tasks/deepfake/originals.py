"""Original frames of samples; no model is loaded."""

from collections.abc import Sequence

from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.originals import known_originals, originals_below
from tasks.common.request import DataRequest, ModelRequest
from tasks.deepfake.demo.scenes import demo_frames
from tasks.deepfake.tags import DEMO_NAMES, LAYOUT


def originals(model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Return original frames; see :meth:`tasks.common.task.Task.originals`."""
    if data.path is not None:
        return originals_below(data.path, ids)
    if model.name not in DEMO_NAMES:
        raise DataError(f"{model.name} has no data of its own: give --data. {LAYOUT}.")
    source = demo_frames("test").source
    return known_originals(ids, source.ids, source.read, "the demo's scenes")
