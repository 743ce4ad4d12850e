"""Random warps of composed digits, per digit and on whole batches at once (per-image PIL would dominate training)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class RandomDigitWarp(nn.Module):
    """Warps each cell of an image by itself: rotation, scale, shear, shift and a smooth elastic displacement.

    Cells hold one digit each, and none leaves its cell. Digits are never flipped or exchanged, so labels
    stay valid. Randomness comes from torch's global generator; every parameter is drawn uniformly
    from plus or minus its value.

    Args:
        degrees: rotation in degrees.
        scale: relative change of width and of height.
        shear: horizontal shear in pixels per pixel.
        shift: translation in pixels in each direction.
        elastic: displacement in pixels of the 4x4 control points of the elastic warp.
        contrast: change of the stroke's weight, as a log2 exponent of the pixel values.
        rows: rows of cells.
        columns: cells of a row; the default is a pair.
    """

    def __init__(
        self,
        degrees: float = 15.0,
        scale: float = 0.15,
        shear: float = 0.2,
        shift: float = 2.0,
        elastic: float = 1.5,
        contrast: float = 0.3,
        rows: int = 1,
        columns: int = 2,
    ) -> None:
        super().__init__()
        self.degrees, self.scale, self.shear, self.shift = degrees, scale, shear, shift
        self.elastic, self.contrast, self.rows, self.columns = elastic, contrast, rows, columns

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Warp images ([b, ]1, rows * h, columns * h), float32 in [0, 1]."""
        batch = images if images.ndim == 4 else images[None]
        # (b, 1, rows * h, columns * h) -> (rows * columns * b, 1, h, h): from here on every digit is an image of its own.
        digits = torch.cat(
            [
                cell
                for row in batch.chunk(self.rows, dim=-2)
                for cell in row.chunk(self.columns, dim=-1)
            ]
        )
        digits = F.grid_sample(
            digits, self._grid(digits), mode="bilinear", align_corners=False
        ).clamp(0, 1)
        gamma = torch.exp2(self._uniform((len(digits), 1, 1, 1), digits) * self.contrast)
        cells = digits.pow(gamma).chunk(self.rows * self.columns)
        rows = [
            torch.cat(cells[i : i + self.columns], dim=-1)
            for i in range(0, len(cells), self.columns)
        ]
        return torch.cat(rows, dim=-2).reshape(images.shape)

    def _grid(self, digits: torch.Tensor) -> torch.Tensor:
        """Draw the sampling grid (n, h, h, 2) in `grid_sample` coordinates."""
        count, _, size, _ = digits.shape
        pixel = 2.0 / size
        angle = self._uniform((count,), digits) * math.radians(self.degrees)
        stretch = 1 + self._uniform((count, 2), digits) * self.scale
        shear = self._uniform((count,), digits) * self.shear
        cos, sin = angle.cos(), angle.sin()
        row_x = torch.stack([cos * stretch[:, 0], shear - sin * stretch[:, 1]], dim=1)
        row_y = torch.stack([sin * stretch[:, 0], cos * stretch[:, 1]], dim=1)
        shift = self._uniform((count, 2), digits) * self.shift * pixel
        theta = torch.cat([torch.stack([row_x, row_y], dim=1), shift[:, :, None]], dim=2)
        grid = F.affine_grid(theta, list(digits.shape), align_corners=False)
        bumps = self._uniform((count, 2, 4, 4), digits) * self.elastic * pixel
        bumps = F.interpolate(bumps, size=(size, size), mode="bicubic", align_corners=True)
        return grid + bumps.permute(0, 2, 3, 1)

    @staticmethod
    def _uniform(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.rand(shape, dtype=like.dtype, device=like.device) * 2 - 1
