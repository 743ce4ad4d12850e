"""The compiled operators of mmcv that the supported detectors use, by torchvision.

:func:`install` registers them as ``mmcv._ext``, before the first import of ``mmcv.ops``.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms
from torchvision.ops import roi_align

from fimaq_core.errors import ModelError

_NAME = "mmcv._ext"


def install() -> None:
    """Register the operators, unless done. Raises ModelError for compiled ones that do not load."""
    if _NAME in sys.modules:
        return
    if importlib.util.find_spec(_NAME) is None:
        sys.modules[_NAME] = Operators()
        return
    try:
        importlib.import_module(_NAME)
    except (ImportError, OSError) as error:
        raise ModelError(
            f"The installed mmcv has compiled operators that do not load with PyTorch {torch.__version__} ({error}): compile "
            "mmcv for it, or install mmcv-lite in its place, which needs none."
        ) from error


class Operators(ModuleType):
    """The module ``mmcv._ext``; other operators raise ModelError when called."""

    def __init__(self) -> None:
        super().__init__(_NAME, "Operators of mmcv by torchvision.")
        self.__spec__ = ModuleSpec(_NAME, None)
        for operator in (nms, roi_align_forward, roi_align_backward):
            setattr(self, operator.__name__, operator)
        for name in ("get_compiler_version", "get_compiling_cuda_version"):
            setattr(self, name, lambda: "none (operators of torchvision)")

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        # mmcv.ops asks at its import for all operators there are; names of Python's own machinery are none
        if name.startswith("_"):
            raise AttributeError(f"module '{_NAME}' has no attribute '{name}'")

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise ModelError(
                f"mmcv's operator '{name}' is needed and there is no such operator without a compiled mmcv: the detectors of "
                "this package use NMS and RoIAlign only. For other models compile mmcv 2.1; it is used if installed."
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (n, 4) that greedy suppression keeps, by falling score."""
    wider = boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes
    return torchvision_nms(wider, scores, iou_threshold)


def roi_align_forward(x: Tensor, rois: Tensor, output: Tensor, *_: Tensor, **settings: Any) -> None:
    """Write the pooled regions of ``x`` (N, C, H, W) into ``output``, see :func:`_pooled`."""
    output.copy_(_pooled(x, rois, **settings))


def roi_align_backward(grad_output: Tensor, rois: Tensor, *rest: Tensor, **settings: Any) -> None:
    """Write the gradient of :func:`roi_align_forward` by its input into the last tensor."""
    grad_input = rest[-1]
    with torch.enable_grad():
        features = torch.zeros_like(grad_input).requires_grad_()
        pooled = _pooled(features, rois, **settings)
    (gradient,) = torch.autograd.grad(pooled, features, grad_output)
    grad_input.copy_(gradient)


def _pooled(
    features: Tensor,
    rois: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", ICCV 2017) of regions (n, 5): image, x1, y1, x2, y2."""
    if pool_mode != 1:
        raise ModelError("RoIAlign with max pooling needs a compiled mmcv: use pool_mode 'avg'.")
    size = (aligned_height, aligned_width)
    return roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned)
