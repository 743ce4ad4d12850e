"""Compiled operators of mmcv that the supported detectors use, replaced by torchvision's.

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
    """Register the operators once. Raises ModelError for compiled operators that do not load."""
    if _NAME in sys.modules:
        return
    if importlib.util.find_spec(_NAME) is None:
        sys.modules[_NAME] = Operators()
        return
    try:
        importlib.import_module(_NAME)
    except (ImportError, OSError) as error:
        raise ModelError(
            "The installed mmcv has compiled operators that do not load with PyTorch "
            f"{torch.__version__} ({error}): compile mmcv for it, or install mmcv-lite in its "
            "place, which needs none."
        ) from error


class Operators(ModuleType):
    """Module ``mmcv._ext``; operators that are not here raise ModelError when called."""

    def __init__(self) -> None:
        super().__init__(_NAME, "Operators of mmcv from torchvision.")
        self.__spec__ = ModuleSpec(_NAME, None)
        for operator in (nms, roi_align_forward, roi_align_backward):
            setattr(self, operator.__name__, operator)
        for name in ("get_compiler_version", "get_compiling_cuda_version"):
            setattr(self, name, lambda: "none (operators of torchvision)")

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        # The import of mmcv.ops looks up every operator. Python looks up names such as __path__.
        if name.startswith("_"):
            raise AttributeError(f"module '{_NAME}' has no attribute '{name}'")

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise ModelError(
                f"mmcv's operator '{name}' needs a compiled mmcv; the detectors of this package "
                "need only NMS and RoIAlign. For other models compile mmcv 2.1: it is used if it "
                "is installed."
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return indices of the boxes (n, 4) that greedy suppression keeps, highest score first."""
    wider = boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes
    return torchvision_nms(wider, scores, iou_threshold)


def roi_align_forward(x: Tensor, rois: Tensor, output: Tensor, *_: Tensor, **settings: Any) -> None:
    """Write the pooled regions of ``x`` (N, C, H, W) into ``output``."""
    output.copy_(_pooled(x, rois, settings))


def roi_align_backward(grad_output: Tensor, rois: Tensor, *rest: Tensor, **settings: Any) -> None:
    """Write the gradient in the input of :func:`roi_align_forward` into the last tensor."""
    with torch.enable_grad():
        features = torch.zeros_like(rest[-1]).requires_grad_()
        pooled = _pooled(features, rois, settings)
    rest[-1].copy_(torch.autograd.grad(pooled, features, grad_output)[0])


def _pooled(features: Tensor, rois: Tensor, settings: dict[str, Any]) -> Tensor:
    """Apply RoIAlign (He et al., ICCV 2017, arXiv:1703.06870); rois are image, x1, y1, x2, y2.

    ``settings`` are the keyword arguments of mmcv's operator.
    """
    if settings["pool_mode"] != 1:
        raise ModelError("RoIAlign with max pooling needs a compiled mmcv: use pool_mode 'avg'.")
    size = settings["aligned_height"], settings["aligned_width"]
    scale, ratio = settings["spatial_scale"], settings["sampling_ratio"]
    return roi_align(features, rois, size, scale, ratio, settings["aligned"])
