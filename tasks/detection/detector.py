"""mmdet's two-stage detectors: cut into segments up to the neck, and put together again."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimaq_core.chain import BlockChain, Kept, MlpPart, Segment
from fimaq_core.errors import DataError, ModelError, NumericsError
from fimaq_core.families import expect
from fimaq_core.families.parts import norm_pair
from fimaq_core.families.rotation import Stream
from fimaq_core.recipe import OFF, Recipe
from tasks.detection import mm
from tasks.detection.neck import ExplicitFPN, pack, unpack_pyramid
from tasks.detection.roi import roi_heads, sample_of
from tasks.detection.swin import AnySizeSwinBlock, ExplicitPatchEmbed, ExplicitPatchMerging

#: Name of the chain of backbone, neck and RPN.
DETECTOR = "detector"


class _StageOutput(nn.Module):
    """Output of a stage for the neck, through its norm: (B, H, W, C) to (B, C, H, W)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).permute(0, 3, 1, 2).contiguous()


class _PackStages(nn.Module):
    """Packs the kept outputs of all stages; the last of them is the output ``x`` of the chain."""

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        return pack(kept)


def detector_segments(model: mm.TwoStageDetector, recipes: Mapping[str, Recipe]) -> list[Segment]:
    """Cut backbone and neck of a Mask R-CNN or Cascade R-CNN; reuse their parameters.

    ``recipes`` holds the recipes of ``backbone`` and ``fpn``. The segments name the norms to
    reparameterise if the backbone is quantized, and the MLPs to reconstruct if it is quantized or
    its recipe asks for it. Raises ModelError for parts of a kind that is not supported.
    """
    expect(model, "A detector", mm.MaskRCNN, mm.CascadeRCNN)
    expect(model.backbone, "A backbone", mm.SwinTransformer)
    recipe, backbone = recipes["backbone"], model.backbone
    quantized = recipe.w_bits != OFF or recipe.a_bits != OFF
    mlps = (MlpPart("mlp"),) if quantized or recipe.reconstruct_mlp else ()
    embed = ExplicitPatchEmbed(backbone.patch_embed, recipe)
    segments = [Segment("backbone.patch_embed", "patch_embed", embed)]
    neck = ExplicitFPN(model.neck, recipes["fpn"])
    stream = Stream(embed.projection.out_channels, recipe)
    if isinstance(embed.norm, nn.Identity):
        stream.write(embed.projection)
    start: nn.Module | None = stream.start(nn.Identity(), embed.norm)
    for number, stage in enumerate(backbone.stages):
        label = f"backbone.stages.{number}"
        for place, original in enumerate(stage.blocks):
            block = AnySizeSwinBlock(original, recipe)
            stream.block(block, pad=block.pad)
            segments.append(Segment(f"{label}.blocks.{place}", "block", block, start, mlps=mlps))
            start = None
            if quantized:
                pairs = norm_pair(block.norm1, "attn.qkv", "pad")
                segments[-1].pairs = pairs + norm_pair(block.norm2, "mlp.fc1")
        norm = getattr(backbone, f"norm{number}")
        stream.read(norm, neck.lateral_convs[number].conv)
        segments[-1].keep = _StageOutput(norm)
        if stage.downsample is not None:
            merging = ExplicitPatchMerging(stage.downsample, recipe)
            stream.read(merging.norm, merging.reduction, copies=4, by_channel=True)
            stream = Stream(merging.reduction.out_features, recipe)
            stream.write(merging.reduction)
            pairs = norm_pair(merging.norm, "reduction") if quantized else ()
            segments.append(Segment(f"{label}.downsample", "merge", merging, pairs=pairs))
    return [*segments, Segment("neck", "neck", neck, before=_PackStages(), takes_kept=True)]


class BackboneAndNeck(nn.Module):
    """Segments of a chain up to its neck: from images (B, 3, H, W) to maps (P2, ..., P6).

    Raises ModelError for a chain without a neck.
    """

    def __init__(self, chain: BlockChain) -> None:
        super().__init__()
        kinds = [segment.kind for segment in chain]
        if "neck" not in kinds:
            raise ModelError(
                "The chain has no neck, so it does not give the maps of a detector's heads."
            )
        segments = list(chain)[: kinds.index("neck") + 1]
        self.chain, self.channels = BlockChain(segments), segments[-1].block.channels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return unpack_pyramid(self.chain(x), self.channels)


class QuantizedDetector(nn.Module):
    """Two-stage detector of mmdet whose layers may be quantizable; it takes one image at a time.

    Features come from ``trunk`` or the chain :data:`DETECTOR` if there is one, else from ``model``,
    the float detector. Layers of RPN and RoI heads are replaced in ``model`` itself.
    """

    def __init__(
        self, model: nn.Module, chains: Mapping[str, BlockChain], trunk: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.rpn_head, self.roi_head = model.rpn_head, model.roi_head
        chain = chains.get(DETECTOR)
        if trunk is None:
            own = nn.Sequential(model.backbone, model.neck)
            trunk = own if chain is None else BackboneAndNeck(chain)
        self.trunk = trunk
        self.eval()

    def extract_feat(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the pyramid (B, C, h, w), finest map first, of images (B, 3, H, W)."""
        features: tuple[Tensor, ...] = self.trunk(image)
        return features

    @torch.no_grad()
    def predict(self, image: Tensor, meta: Mapping[str, object]) -> mm.DetDataSample:
        """Detect objects in one image (1, 3, H, W), normalised and padded, with its meta.

        ``pred_instances`` are in pixels of the original image. Raises DataError for a batch or a
        meta that lacks entries, and NumericsError for NaN or infinity, with which mmdet would find
        fewer objects without a message.
        """
        if len(image) != 1:
            raise DataError(
                f"Detectors are run on one image at a time, and this is a batch of {len(image)}."
            )
        sample = sample_of(meta)
        parts = {"backbone and neck": self.trunk, "the RPN": self.rpn_head}
        parts |= {f"the RoI head {name}": head for name, head in roi_heads(self).items()}
        with ExitStack() as context, warnings.catch_warnings():
            # mmdet copies the masks of a cascade in this way.
            warnings.filterwarnings("ignore", "To copy construct from a tensor")
            for name, part in parts.items():
                context.enter_context(part.register_forward_hook(partial(_check, name)))
            return self.objects(self.extract_feat(image), sample)

    def objects(self, features: tuple[Tensor, ...], sample: mm.DetDataSample) -> mm.DetDataSample:
        """Add the objects that the heads find in an image's maps (1, C, h, w) to its sample."""
        proposals = self.rpn_head.predict(features, [sample], rescale=False)
        (sample.pred_instances,) = self.roi_head.predict(
            features, proposals, [sample], rescale=True
        )
        return sample


def _check(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    """Raise NumericsError for NaN or infinity in the output of a part."""
    if not all(bool(one.isfinite().all()) for one in tree_leaves(output)):
        raise NumericsError(
            f"The output of {name} holds NaN or infinity, so the objects found would be wrong."
        )
