"""The compiled operators of mmcv that the supported detectors use, by torchvision: ``mmcv-lite`` comes without them.

:func:`install` registers them as the module ``mmcv._ext``, of which ``mmcv.ops`` is a front, unless mmcv was compiled. It has to
run before ``mmcv.ops`` is imported first; :mod:`tasks.detection.mm` sees to that.
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
    """Register the operators as ``mmcv._ext``; does nothing where mmcv brings them compiled, or if done before.

    Raises:
        ModelError: a compiled mmcv that does not load with this PyTorch.
    """
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
    """The module ``mmcv._ext``: what is written below, and for any other operator a function that says who has it."""

    def __init__(self) -> None:
        super().__init__(_NAME, "Operators of mmcv by torchvision.")
        self.__spec__ = ModuleSpec(_NAME, None)
        for operator in (nms, roi_align_forward, roi_align_backward, get_compiler_version, get_compiling_cuda_version):
            setattr(self, operator.__name__, operator)

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
    """Indices (int64) of the boxes (n, 4) that greedy non-maximum suppression keeps, by falling score.

    A box goes if its overlap with a kept one of higher score is above ``iou_threshold``. Sides are ``x2 - x1 + offset``.
    """
    return torchvision_nms(_with_offset(boxes, offset), scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., "Mask R-CNN", ICCV 2017, arXiv 1703.06870), written into ``output``.

    Args:
        input: (N, C, H, W).
        rois: (n, 5): index of the image, x1, y1, x2, y2.
        output: (n, C, aligned_height, aligned_width).
        argmax_y, argmax_x: of max pooling; not written.
        spatial_scale: from the coordinates of ``rois`` to those of ``input``.
        sampling_ratio: samples a bin along each side; 0: as many as it takes for one a cell.
        pool_mode: 1, the mean of a bin's samples.
        aligned: pixel centres at half coordinates.

    Raises:
        ModelError: max pooling.
    """
    if pool_mode != 1:
        raise ModelError("RoIAlign with max pooling needs a compiled mmcv: use pool_mode 'avg'.")
    size = (aligned_height, aligned_width)
    output.copy_(roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient by ``input`` of :func:`roi_align_forward`, written into ``grad_input`` (N, C, H, W)."""
    with torch.enable_grad():
        features = torch.zeros_like(grad_input).requires_grad_()
        pooled = roi_align(features, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
    (gradient,) = torch.autograd.grad(pooled, features, grad_output)
    grad_input.copy_(gradient)


def get_compiler_version() -> str:
    """What mmcv's report of the environment says of the compiler."""
    return "none (operators of torchvision)"


def get_compiling_cuda_version() -> str:
    """What mmcv's report of the environment says of CUDA."""
    return "none (operators of torchvision)"


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    return boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes
