"""A detector put together: features by a chain or the float model, the rest by mmdet."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError, NumericsError
from tasks.detection.chain import BackboneAndNeck
from tasks.detection.mm import DetDataSample
from tasks.detection.roi import described, roi_heads

#: Name of the chain of backbone, neck and RPN.
DETECTOR = "detector"


class QuantizedDetector(nn.Module):
    """A two-stage detector of mmdet whose layers may be quantizable, image by image.

    The chain of :data:`DETECTOR` gives the features, else the float model does. The heads' layers
    were swapped.
    """

    def __init__(self, model: nn.Module, chains: Mapping[str, BlockChain]) -> None:
        super().__init__()
        self.rpn_head, self.roi_head = model.rpn_head, model.roi_head
        chain = chains.get(DETECTOR)
        self.trunk = (
            nn.Sequential(model.backbone, model.neck) if chain is None else BackboneAndNeck(chain)
        )
        self.eval()

    def extract_feat(self, image: Tensor) -> tuple[Tensor, ...]:
        """Pyramid (B, C, h, w), the finest map first, of images (B, 3, H, W)."""
        features: tuple[Tensor, ...] = self.trunk(image)
        return features

    @torch.no_grad()
    def predict(self, image: Tensor, meta: Mapping[str, object]) -> DetDataSample:
        """Detect objects in one image (1, 3, H, W), normalised and padded, with its meta.

        ``pred_instances`` are in coordinates of the original image. Raises DataError, and
        NumericsError for NaN or infinity, where mmdet would just find less.
        """
        if len(image) != 1:
            raise DataError(
                f"Detectors are run on one image at a time, and this is a batch of {len(image)}."
            )
        sample = described(meta)
        with self._checked(), warnings.catch_warnings():
            # how mmdet copies a cascade's masks
            warnings.filterwarnings("ignore", "To copy construct from a tensor")
            features = self.extract_feat(image)
            proposals = self.rpn_head.predict(features, [sample], rescale=False)
            (sample.pred_instances,) = self.roi_head.predict(
                features, proposals, [sample], rescale=True
            )
        return sample

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Check all outputs of trunk and heads for NaN and infinity before they are used."""
        named = {"backbone and neck give": self.trunk, "the RPN gives": self.rpn_head}
        named |= {f"the RoI head {name} gives": head for name, head in roi_heads(self).items()}
        handles = [
            module.register_forward_hook(partial(_check, name)) for name, module in named.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check(what: str, _module: nn.Module, _args: Any, output: Any) -> None:
    if not all(bool(one.isfinite().all()) for one in tree_leaves(output)):
        raise NumericsError(
            f"What {what} holds NaN or infinity, so what is found would not be what the model says."
        )
