"""A small detector-like chain for images of varying sizes: kept outputs, a neck, a predictor."""

import torch
from small_models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import BlockChain, Kept, MlpPart, NormPair, Segment
from fimaq_core.fisher.divergence import Divergence, kl_divergence
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples

WIDTH = 8
SIZES = ((16, 24), (24, 16), (16, 16), (32, 24), (24, 16))


class Embed(nn.Module):
    """Patches of 4 x 4: (B, 3, H, W) to (B, H / 4, W / 4, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention in windows of 1 x 2 positions, then an MLP, on (B, H, W, C)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Mlp()
        self.qk, self.product = nn.Linear(WIDTH, 2 * WIDTH), QuantMatMul(recipe.a_bits)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(self.norm1(x).reshape(-1, 2, WIDTH)).chunk(2, -1)
        scores = self.product(q[:, None], k[:, None].mT)[:, 0].softmax(-1)
        x = x + (scores @ k).view(x.shape)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Keep(nn.Module):
    """A norm, and channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x).permute(0, 3, 1, 2)
        return out


class Join(nn.Module):
    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        return torch.cat(kept, 1)


class Predict(nn.Module):
    """Class logits of every position, (B, L, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x).flatten(2).mT
        return out


def swap(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Quantizable layers for all that can have them."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantLinear.from_float(child, recipe.w_bits, recipe.a_bits))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, QuantConv2d.from_float(child, recipe.w_bits, recipe.a_bits))
        else:
            swap(child, recipe)
    return module


def pyramid(recipe: Recipe, seed: int = 0) -> BlockChain:
    """Embedding, two blocks that keep their outputs, a neck of both, a predictor."""
    parts = [
        Embed(),
        Block(recipe),
        Block(recipe),
        nn.Sequential(nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)),
        Predict(),
    ]
    keeps = [Keep(), Keep()]
    for number, part in enumerate([*parts, *keeps]):
        randomise(part, seed + number)
    embed, first, second, neck, predict = (swap(part, recipe) for part in parts)

    def block(label: str, module: nn.Module, keep: nn.Module) -> Segment:
        assert isinstance(module, Block)
        assert isinstance(module.norm2, nn.LayerNorm)
        return Segment(
            label,
            "block",
            module,
            pairs=(NormPair(module.norm2, "mlp.fc1"),),
            mlps=(MlpPart("mlp"),),
            keep=keep,
        )

    return BlockChain(
        [
            Segment("embed", "patch_embed", embed),
            block("blocks.0", first, keeps[0]),
            block("blocks.1", second, keeps[1]),
            Segment("neck", "neck", neck, before=Join(), takes_kept=True),
            Segment("predict", "predictor", predict),
        ]
    )


def by_hand(chain: BlockChain, image: Tensor) -> list[Tensor]:
    """Outputs of every block of a pyramid for one image, without the chain's own walk."""
    embed, first, second, neck, predict = chain
    out = [embed.block(image)]
    out.append(first.block(out[-1]))
    out.append(second.block(out[-1]))
    assert first.keep is not None
    assert second.keep is not None
    out.append(neck.block(torch.cat([first.keep(out[1]), second.keep(out[2])], 1)))
    out.append(predict.block(out[-1]))
    return out


def varied(count: int = len(SIZES), seed: int = 1) -> Samples:
    """Images (1, 3, H, W) of varying sizes, of slowly varying brightness."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        coarse = torch.randn(1, 3, 4, 4, generator=generator)
        size = SIZES[number % len(SIZES)]
        smooth = F.interpolate(coarse, size=size, mode="bilinear")
        found.append(smooth + 0.3 * torch.randn(1, 3, *size, generator=generator))
    return Samples(found)


class Positions(Divergence):
    """KL of the classes of every position, summed over positions."""

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return kl_divergence(outputs.flatten(0, 1), reference.flatten(0, 1)) * outputs.shape[1]
