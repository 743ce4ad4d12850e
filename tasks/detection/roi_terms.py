"""The optional term of the divergence: classes of the full-precision model's proposals."""

import copy

import torch
from torch import Tensor, nn

from fimaq_core.chain import Kept, Segment
from tasks.detection.heads import stages
from tasks.detection.neck import ExplicitFPN, Unpack
from tasks.detection.roi import class_logits_on, float_proposals


class _Hidden(nn.Module):
    """Holds a float detector outside of the chain: neither counted nor kept in checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]

    def there(self, device: torch.device) -> nn.Module:
        return self._model[0].to(device)


class _Proposals(_Hidden):
    """The side of the chain: an image (1, 3, H, W) to the float RPN's proposals (1, P, 4)."""

    def forward(self, image: Tensor) -> Tensor:
        return float_proposals(self.there(image.device), image, _whole(image)).unsqueeze(0)


class _Terms(_Hidden):
    """Appends the class logits of all proposals to the RPN's outputs: (1, L, 5 A) to (1, M)."""

    def __init__(self, model: nn.Module, unpack: Unpack) -> None:
        super().__init__(model)
        self.unpack = unpack

    def forward(self, x: Tensor, side: Tensor, kept: Kept) -> Tensor:
        # RoIAlign has no form of fewer digits.
        with torch.autocast(x.device.type, enabled=False):
            logits = class_logits_on(self.there(x.device), self.unpack(kept[-1].float()), side[0].float())
        return torch.cat([x.flatten(1).float(), logits.reshape(1, -1)], 1)


def _whole(image: Tensor) -> dict[str, object]:
    """The meta of an image (1, 3, H, W) without padding."""
    size = tuple(image.shape[2:])
    return {"img_shape": size, "pad_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}


class ProposalTerms:
    """The term's modules, made from a detector before any of its layers is swapped.

    ``proposals`` is the side of the chain.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False)
        self.proposals = _Proposals(self._model)

    def added(self, segments: list[Segment]) -> list[Segment]:
        """``segments`` up to the RPN, and one behind them that adds the logits to the output."""
        (neck,) = (segment for segment in segments if segment.kind == "neck")
        assert isinstance(neck.block, ExplicitFPN)
        neck.keep = nn.Identity()
        terms = _Terms(self._model, Unpack(neck.block.channels))
        return [*segments, Segment("roi_terms", "predictor", nn.Identity(), terms, takes_side=True, takes_kept=True)]


def class_count(model: nn.Module) -> int:
    """Number of logits per proposal: the classes and the background."""
    _, head = stages("bbox", model.roi_head.bbox_head)[0]
    return int(head.fc_cls.out_features)
