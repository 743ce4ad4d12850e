"""A detector put together again: features by a chain or by the float model, the rest by mmdet's own heads."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError, ModelError, NumericsError
from tasks.detection.chain import backbone_and_neck
from tasks.detection.heads import roi_heads
from tasks.detection.mm import DetDataSample

#: Name of the chain of backbone, neck and RPN.
DETECTOR = "detector"

#: What mmdet's heads ask of an image: its size before padding and with it, the original one, and factors (x, y) to the former.
META = ("img_shape", "pad_shape", "ori_shape", "scale_factor")


class QuantizedDetector(nn.Module):
    """What is evaluated: a two-stage detector of mmdet whose layers may be quantizable ones, image by image.

    Args:
        model: mmdet's detector. The layers of its heads are swapped in place, so these are taken as they are.
        chain: of backbone, neck and RPN, by which features are computed; None for the float model's own backbone and neck.
    """

    def __init__(self, model: nn.Module, chain: BlockChain | None) -> None:
        super().__init__()
        self.rpn_head, self.roi_head = model.rpn_head, model.roi_head
        self.trunk = nn.Sequential(model.backbone, model.neck) if chain is None else backbone_and_neck(chain)
        self.eval()

    def extract_feat(self, image: Tensor) -> tuple[Tensor, ...]:
        """The pyramid, each map (B, C, h, w), the finest first, of images (B, 3, H, W)."""
        features: tuple[Tensor, ...] = self.trunk(image)
        return features

    @torch.no_grad()
    def predict(self, image: Tensor, meta: Mapping[str, object]) -> DetDataSample:
        """What is detected, in coordinates of the original image.

        Args:
            image: (1, 3, H, W), normalised and padded.
            meta: see :data:`META`.

        Returns:
            With ``pred_instances``: ``bboxes`` (n, 4), ``scores`` (n,), ``labels`` (n,) and, with mask heads, ``masks``
            (n, height, width) of bool.

        Raises:
            DataError: several images, or one of which something is not said.
            NumericsError: NaN or infinity in the maps, or in what a head makes of them. (mmdet leaves out what has no score: such
                a detector would just find less.)
        """
        if len(image) != 1:
            raise DataError(f"Detectors are run on one image at a time, and this is a batch of {len(image)}.")
        sample = described(meta)
        with self._checked(), warnings.catch_warnings():
            # how mmdet copies a cascade's masks
            warnings.filterwarnings("ignore", "To copy construct from a tensor")
            features = self.extract_feat(image)
            proposals = self.rpn_head.predict(features, [sample], rescale=False)
            (sample.pred_instances,) = self.roi_head.predict(features, proposals, [sample], rescale=True)
        return sample

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Whatever trunk and heads give inside is checked before it is used."""
        named = {"backbone and neck give": self.trunk, "the RPN gives": self.rpn_head}
        named |= {f"the RoI head {name} gives": head for name, head in roi_heads(self).items()}
        handles = [module.register_forward_hook(_checker(name)) for name, module in named.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _checker(what: str) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that refuses a module's output, which is called ``what``. Raises NumericsError."""

    def check(module: nn.Module, args: Any, output: Any) -> None:
        if not all(bool(one.isfinite().all()) for one in _tensors(output)):
            raise NumericsError(f"What {what} holds NaN or infinity, so what is found would not be what the model says.")

    return check


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


def assemble(model: nn.Module, chains: Mapping[str, BlockChain]) -> QuantizedDetector:
    """The detector that predicts by ``chains``; without any it is the float model.

    Args:
        model: mmdet's detector.
        chains: by part. That of :data:`DETECTOR` gives the features; those of heads share their layers with ``model``.

    Raises:
        ModelError: a detector that is not made of backbone, neck, RPN and RoI head.
    """
    missing = [name for name in ("backbone", "neck", "rpn_head", "roi_head") if getattr(model, name, None) is None]
    if missing:
        raise ModelError(f"A detector of type {type(model).__name__} without {', '.join(missing)} is not supported.")
    return QuantizedDetector(model, chains.get(DETECTOR))


def described(meta: Mapping[str, object]) -> DetDataSample:
    """``meta`` as mmdet's heads take it. Raises DataError if something of :data:`META` is missing."""
    missing = [name for name in META if name not in meta]
    if missing:
        raise DataError(f"An image comes without {', '.join(missing)}.")
    return DetDataSample(metainfo=dict(meta))
