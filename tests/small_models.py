"""Small models with random weights that several tests share."""

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import Divergence, Measure
from fimaq_core.recipe import Recipe, make_recipe


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a visible value: norms, biases and position embeddings too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.LayerNorm):
                parameter.copy_(torch.exp(0.6 * noise) if name == "weight" else 0.4 * noise)
            elif name == "weight" and parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def vit(
    depth: int = 2, width: int = 32, classes: int = 10, seed: int = 0, **arguments: object
) -> VisionTransformer:
    """A ViT on 32 x 32 images: 16 patches and the class token."""
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=classes,
        **arguments,
    )
    randomise(model, seed)
    return model


def deit(depth: int = 2, seed: int = 0) -> VisionTransformerDistilled:
    """A distilled DeiT on 32 x 32 images."""
    model = VisionTransformerDistilled(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=depth,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=10,
    )
    randomise(model, seed)
    return model


def swin(size: int = 40, seed: int = 0) -> SwinTransformer:
    """A Swin with shifted windows and one merging; 40 pixels give 10 x 10 tokens, padded to 12."""
    model = SwinTransformer(
        img_size=size,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        mlp_ratio=2.0,
        num_classes=10,
    )
    randomise(model, seed)
    return model


def chain_of(model: nn.Module, recipe: Recipe) -> BlockChain:
    """The model as a chain, by the family that knows it."""
    return find_family(model).build(model, recipe)


def images(count: int, size: int = 32, seed: int = 1) -> Tensor:
    """Random images (count, 3, size, size) of slowly varying brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def quick(method: str = "fimaq", **changes: object) -> Recipe:
    """A recipe for seconds: few images, candidates and steps."""
    few: dict[str, object] = {
        "calibration_images": 24, "range_images": 8, "range_candidates": 32, "range_rounds": 1,
        "steps": 6, "batch_size": 8,
        "fisher_k": 2, "lr_alpha": 0.05, "lr_scale": 1e-3,
    }  # fmt: skip
    return make_recipe(method, few, changes)


class Measured(Divergence):
    """A divergence that is a function of outputs and reference."""

    def __init__(self, measure: Measure, batch: int | None = None) -> None:
        self.measure, self.batch = measure, batch

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return self.measure(outputs, reference)
