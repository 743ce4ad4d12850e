"""Loading detectors: demo models, and Mask R-CNN and Cascade Mask R-CNN on Swin."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel
from tasks.common.weights import load_state, read_weights
from tasks.detection import mm
from tasks.detection.configs import RESIZE, build, published_config
from tasks.detection.keys import adapted, class_names
from tasks.detection.tags import CATALOGUE, DEMO_NAMES, full_name, missing_weights

#: (C, H, W) of a photograph of usual proportions, resized and padded.
_INPUT_SHAPE = (3, 800, 1344)


class Pipeline:
    """Turns images into inputs, each by itself: its padding depends on no other image.

    ``preprocessor`` is the detector's (a copy on the CPU is used); ``resize`` are keyword arguments
    of mmdet's ``Resize``, None leaves sizes as they are.
    """

    def __init__(self, preprocessor: mm.DetDataPreprocessor, resize: Mapping[str, Any] | None = None) -> None:
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


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a detector with its weights and pipeline. Raises ModelError, NumericsError."""
    missing = missing_weights(request)
    if missing is not None:
        raise ModelError(describe_missing([missing]))
    tag, path = CATALOGUE.model_tag(request), CATALOGUE.local_weights(request)
    if request.name in DEMO_NAMES:
        # the demo's scenes are needed with its models only
        from tasks.detection.demo.coco_files import CLASSES
        from tasks.detection.demo.models import DEMO
        from tasks.detection.demo.scenes import DATA, SCENE_SIZES

        model, stored = DEMO.load(request, path)
        known: tuple[str, ...] | None = CLASSES
        resize, data, shape = None, DATA, (3, SCENE_SIZES[1], SCENE_SIZES[1])
    else:
        if path is None:
            raise ModelError(f"There is no weights file of {tag}.")
        if request.preprocessing:
            raise ModelError("Detectors have a preprocessing of their own: give pixel_mean and pixel_std in --model-args.")
        model = _create(full_name(request.name).partition(".")[0], request.model_args)
        stored = read_weights(path, request.weights_entry)
        load_state(model, adapted(stored.state, model, str(path)), str(path))
        known, resize, data, shape = None, RESIZE, None, _INPUT_SHAPE
    names = class_names(stored, _classes(model)) or known
    if names is not None:
        model.dataset_meta = {"classes": names}  # type: ignore[assignment]
    # It gives more than an image: see tasks.detection.calibration and tasks.detection.evaluate.
    pipeline: Any = Pipeline(model.data_preprocessor, resize)
    return LoadedModel(
        model,
        tag,
        f"file {stored.path.name}",
        stored.sha256(model, altered=bool(request.model_args)),
        _classes(model),
        pipeline,
        pipeline,
        data=data,
        input_shape=shape,
        entry=stored.entry,
        entries=stored.entries,
        class_names=names,
    )


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        return build(published_config(name, **arguments))
    except (TypeError, ValueError, LookupError, AssertionError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{name} cannot be built with {arguments}: {error}") from error


def _classes(model: nn.Module) -> int:
    head = model.roi_head.bbox_head
    return int((head[0] if isinstance(head, nn.ModuleList) else head).num_classes)
