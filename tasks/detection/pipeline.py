"""From an image to a detector's input: mmdet's own resizing, normalisation and padding."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from tasks.detection.mm import DetDataPreprocessor


class Pipeline:
    """Turns images into inputs, each by itself: its padding depends on no other image.

    ``preprocessor`` is the detector's (a copy on the CPU is used); ``resize`` are keyword arguments
    of mmdet's ``Resize``, None leaves sizes as they are.
    """

    def __init__(self, preprocessor: "DetDataPreprocessor", resize: Mapping[str, Any] | None = None) -> None:
        from tasks.detection import mm

        self.preprocessor = copy.deepcopy(preprocessor).cpu().eval()
        self.resize = None if resize is None else mm.Resize(**resize)
        self.pack = mm.PackDetInputs(meta_keys=("ori_shape", "img_shape", "scale_factor"))

    def __call__(self, array: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        """Prepare an image (H, W, 3) uint8, blue first.

        Returns:
            (1, 3, H', W') float32, normalised, padded; and mmdet's meta: ``ori_shape``,
            ``img_shape`` (resized), ``pad_shape``, ``batch_input_shape``, each (height, width), and
            ``scale_factor`` (width, height).
        """
        size = array.shape[:2]
        results = {"img": array, "img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        packed = self.pack(results if self.resize is None else self.resize(results))
        batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
        done = self.preprocessor(batch, training=False)
        return done["inputs"], dict(done["data_samples"][0].metainfo)
