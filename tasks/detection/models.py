"""Loading detectors: demo models, and Mask R-CNN and Cascade Mask R-CNN on Swin."""

from typing import Any

from torch import nn

from fimaq_core.errors import ModelError
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel
from tasks.common.weights import load_state, read_weights
from tasks.detection.configs import RESIZE, build, published_config
from tasks.detection.keys import adapted, class_names
from tasks.detection.pipeline import Pipeline
from tasks.detection.tags import CATALOGUE, DEMO_NAMES, full_name, missing_weights

#: (C, H, W) of a photograph of usual proportions, resized and padded.
_INPUT_SHAPE = (3, 800, 1344)


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
