"""Loading detectors: demo models, and Mask R-CNN and Cascade Mask R-CNN on Swin.

Weights come from files of mmdet (2 or 3) or of the Swin-Transformer-Object-Detection repository.
The repository has other names in the backbone, and merges pixels in another order. All names must
fit.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from tasks.common.models import building
from tasks.common.models.weights import StoredWeights, load_state, read_weights
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel
from tasks.detection import mm
from tasks.detection.configs import RESIZE, DetectorArguments, build, published_config
from tasks.detection.tags import CATALOGUE, DEMO_NAMES, full_name, missing_weights

#: Patterns of the Swin repository's names, and mmdet's names. They are applied in this order.
_RENAMED = (
    (r"^backbone\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"^backbone\.layers\.(\d+)\.", r"backbone.stages.\1."),
    (r"(^backbone\.stages\.\d+\.blocks\.\d+)\.attn\.", r"\1.attn.w_msa."),
    (r"(^backbone\.stages\.\d+\.blocks\.\d+)\.mlp\.fc1\.", r"\1.ffn.layers.0.0."),
    (r"(^backbone\.stages\.\d+\.blocks\.\d+)\.mlp\.fc2\.", r"\1.ffn.layers.1."),
)
_MERGING = re.compile(r"^backbone\.stages\.\d+\.downsample\.")


class Pipeline:
    """Turns one image into an input; its padding does not depend on other images.

    ``preprocessor`` is the detector's own; a copy on the CPU is used. ``resize`` are the arguments
    of mmdet's ``Resize``; None keeps the size.
    """

    def __init__(self, preprocessor: nn.Module, resize: Mapping[str, Any] | None = None) -> None:
        self.preprocessor = copy.deepcopy(preprocessor).cpu().eval()
        self.resize = None if resize is None else mm.Resize(**resize)
        self.pack = mm.PackDetInputs(meta_keys=("ori_shape", "img_shape", "scale_factor"))

    def __call__(self, array: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        """Prepare an image (H, W, 3) uint8, blue first.

        Returns:
            The input (1, 3, H', W') float32, normalised and padded, and mmdet's meta:
            ``ori_shape``, ``img_shape`` (resized), ``pad_shape``, ``batch_input_shape``, each
            (height, width), and ``scale_factor`` (width, height).
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
    known: tuple[str, ...] | None = None
    if request.name in DEMO_NAMES:
        # Only the demo models need the demo's scenes.
        from tasks.detection.demo.coco_files import CLASSES
        from tasks.detection.demo.models import DEMO
        from tasks.detection.demo.scenes import DATA, SCENE_SIZES

        model, stored = DEMO.load(request, path)
        known, resize, data, shape = CLASSES, None, DATA, (3, SCENE_SIZES[1], SCENE_SIZES[1])
    else:
        if path is None:
            raise ModelError(f"There is no weights file of {tag}.")
        model, stored = _published(request, path), read_weights(path, request.weights_entry)
        load_state(model, adapted(stored.state, model, str(path)), str(path))
        # The shape of a photograph of usual proportions, resized and padded.
        resize, data, shape = RESIZE, None, (3, 800, 1344)
    head = model.roi_head.bbox_head
    classes = int((head[0] if isinstance(head, nn.ModuleList) else head).num_classes)
    names = class_names(stored, classes) or known
    if names is not None:
        model.dataset_meta = {"classes": names}  # type: ignore[assignment]
    # Typed as Any: it returns image and meta, which only this task expects.
    pipeline: Any = Pipeline(model.data_preprocessor, resize)
    return LoadedModel(
        model,
        tag,
        f"file {stored.path.name}",
        stored.sha256(model, altered=bool(request.model_args)),
        classes,
        pipeline,
        pipeline,
        data=data,
        input_shape=shape,
        entry=stored.entry,
        entries=stored.entries,
        class_names=names,
        notes=stored.notes(),
    )


def _published(request: ModelRequest, weights: Path) -> nn.Module:
    """Build a published detector with random weights; ``weights`` bounds it. Raises ModelError."""
    if request.preprocessing:
        raise ModelError(
            "Detectors have their own preprocessing: give pixel_mean and pixel_std in --model-args."
        )
    name, arguments = full_name(request.name).partition(".")[0], request.model_args
    building.check_arguments(DetectorArguments, arguments)
    try:
        config = published_config(name, **arguments)
        return building.build_bounded(lambda device: build(config), weights)
    except (
        *(TypeError, ValueError, LookupError, AssertionError),
        *(RuntimeError, AttributeError, ArithmeticError),
    ) as error:
        raise ModelError(f"{name} cannot be built with {arguments}: {error}") from error


def class_names(stored: StoredWeights, classes: int) -> tuple[str, ...] | None:
    """Return the class names in order, from the ``meta`` of mmdet's file. Raises ModelError."""
    names = stored.class_names
    if not names:
        return None
    if len(set(names)) < len(names):
        raise ModelError(
            f"The class names in the weights {stored.path} are not distinct: {str(names)[:200]}."
        )
    if len(names) != classes:
        raise ModelError(
            f"The weights {stored.path} name {len(names)} classes and have outputs for {classes}: "
            "correct the names in their meta, or give the tensors alone, as safetensors."
        )
    return names


def adapted(state: Mapping[str, Tensor], model: nn.Module, where: str) -> dict[str, Tensor]:
    """Convert weights to the names and the order of mmdet's ``model``. Raises ModelError.

    Averaged copies (``ema_``) are dropped. Mean and deviation of images are compared with those of
    the model, and dropped.
    """
    found = of_mmdet({name: value for name, value in state.items() if not name.startswith("ema_")})
    for name in ("mean", "std"):
        value = found.pop(f"data_preprocessor.{name}", None)
        own = getattr(model.data_preprocessor, name).flatten().float()
        if value is not None and not torch.equal(value.flatten().float(), own):
            raise ModelError(
                f"The weights {where} are for images with another {name}: "
                f"{value.flatten().tolist()[:3]}."
            )
    expected = model.state_dict()
    for name in [name for name in found if name.endswith("relative_position_index")]:
        value, own = found[name], expected.get(name)
        if own is not None and value.shape == own.shape and not torch.equal(value, own):
            raise ModelError(
                f"The weights {where} number the positions in a window differently than mmdet: "
                f"{name!r}."
            )
    return found


def of_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of the Swin repository's detectors to mmdet's names and order.

    Raises ModelError: a weight has both names.
    """
    if not any(name.startswith("backbone.layers.") for name in state):
        return dict(state)
    converted = {}
    for name, value in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if name in converted:
            raise ModelError(f"The weights have {name!r} twice: in mmdet's and in Swin's names.")
        whole = value.ndim > 0 and value.shape[-1] % 4 == 0  # others do not fit any model
        converted[name] = merging_order(value) if whole and _MERGING.match(name) else value
    return converted


def merging_order(value: Tensor) -> Tensor:
    """Reorder the last dimension, 4 C, from the Swin repository's order to mmdet's.

    The repository joins all channels of one pixel, then those of the next pixel, column by column.
    mmdet (``nn.Unfold``) joins the four pixels of one channel, row by row, then those of the next.
    """
    return value.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)
