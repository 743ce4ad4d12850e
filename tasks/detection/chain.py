"""mmdet's two-stage detectors cut into segments, up to the neck."""

from collections.abc import Mapping

from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Kept, MlpPart, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.parts import norm_pair
from fimaq_core.recipe import OFF, Recipe
from tasks.detection.mm import (
    CascadeRCNN,
    MaskRCNN,
    SwinBlockSequence,
    SwinTransformer,
    TwoStageDetector,
    expect,
)
from tasks.detection.neck import ExplicitFPN, Unpack, pack
from tasks.detection.swin import AnySizeSwinBlock, ExplicitPatchEmbed, ExplicitPatchMerging


class _StageOutput(nn.Module):
    """Output of a stage for the neck, through its norm: (B, H, W, C) to (B, C, H, W)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).permute(0, 3, 1, 2).contiguous()


class _PackStages(nn.Module):
    """Packs the outputs that the stages kept; ``x`` is the last block's output, kept as well."""

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        return pack(kept)


def detector_segments(model: TwoStageDetector, recipes: Mapping[str, Recipe]) -> list[Segment]:
    """Cut backbone and neck of a Mask R-CNN or Cascade R-CNN; takes over their parameters.

    ``recipes`` are for ``backbone`` and ``fpn``. A quantized backbone offers its norms for
    reparameterisation and its MLPs for MLP reconstruction; the MLPs also if the recipe asks for it.
    Raises ModelError for parts of a kind that is not supported.
    """
    expect(model, "A detector", MaskRCNN, CascadeRCNN)
    expect(model.backbone, "A backbone", SwinTransformer)
    recipe, embed = recipes["backbone"], model.backbone.patch_embed
    segments = [Segment("backbone.patch_embed", "patch_embed", ExplicitPatchEmbed(embed, recipe))]
    for number, stage in enumerate(model.backbone.stages):
        output = _StageOutput(getattr(model.backbone, f"norm{number}"))
        segments += _stage_segments(f"backbone.stages.{number}", stage, output, recipe)
    neck = ExplicitFPN(model.neck, recipes["fpn"])
    return [*segments, Segment("neck", "neck", neck, before=_PackStages(), takes_kept=True)]


def _stage_segments(
    label: str, stage: SwinBlockSequence, output: nn.Module, recipe: Recipe
) -> list[Segment]:
    quantized = recipe.w_bits != OFF or recipe.a_bits != OFF
    segments = []
    for number, original in enumerate(stage.blocks):
        block = AnySizeSwinBlock(original, recipe)
        pairs = norm_pair(block.norm1, "attn.qkv", "pad") + norm_pair(block.norm2, "mlp.fc1")
        segment = Segment(f"{label}.blocks.{number}", "block", block)
        segment.pairs = pairs if quantized else ()
        segment.mlps = (MlpPart("mlp"),) if quantized or recipe.reconstruct_mlp else ()
        segments.append(segment)
    segments[-1].keep = output
    if stage.downsample is not None:
        merging = ExplicitPatchMerging(stage.downsample, recipe)
        pairs = norm_pair(merging.norm, "reduction") if quantized else ()
        segments.append(Segment(f"{label}.downsample", "merge", merging, pairs=pairs))
    return segments


class BackboneAndNeck(nn.Module):
    """A chain up to its neck, in place of mmdet's modules: images to maps (P2, ..., P6).

    Raises ModelError for a chain without a neck.
    """

    def __init__(self, chain: BlockChain) -> None:
        super().__init__()
        kinds = [segment.kind for segment in chain]
        if "neck" not in kinds:
            raise ModelError(
                "The chain has no neck, so it does not give the maps of a detector's heads."
            )
        self.segments = nn.ModuleList(list(chain)[: kinds.index("neck") + 1])
        self.unpack = Unpack(self.segments[-1].block.channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept: Kept = ()
        for segment in self.segments:
            x = segment(x, None, kept)
            kept = segment.kept_with(x, kept)
        return self.unpack(x)
