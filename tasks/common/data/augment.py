"""Random warps of images of digits. They take whole batches, which is faster than single images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RandomDigitWarp:
    """Warps each cell of an image: rotation, scale, shear, shift and a smooth elastic displacement.

    Each cell holds one digit, which stays in its cell and is never flipped, so labels stay valid.
    The fields are limits: every value is uniform in [-limit, limit], drawn by torch's global
    generator.

    Example:
        >>> RandomDigitWarp(degrees=5.0)(torch.rand(8, 1, 28, 56)).shape
        torch.Size([8, 1, 28, 56])
    """

    degrees: float = 15.0  # rotation
    scale: float = 0.15  # relative change of width and of height
    shear: float = 0.2  # horizontal, in pixels per pixel
    shift: float = 2.0  # in pixels, in each direction
    elastic: float = 1.5  # displacement of 4 x 4 control points, in pixels
    contrast: float = 0.3  # log2 of the exponent of pixel values; it changes the stroke width
    rows: int = 1  # number of rows of cells
    columns: int = 2

    def __call__(self, images: Tensor) -> Tensor:
        """Return warped images ([b, ]1, rows * h, columns * h), float32 in [0, 1]."""
        batch = images if images.ndim == 4 else images[None]
        # (b, 1, rows * h, columns * h) -> (rows * columns * b, 1, h, h): one image per digit
        rows = batch.chunk(self.rows, dim=-2)
        digits = torch.cat([cell for row in rows for cell in row.chunk(self.columns, dim=-1)])
        grid = self._grid(digits)
        digits = F.grid_sample(digits, grid, mode="bilinear", align_corners=False).clamp(0, 1)
        gamma = torch.exp2(_uniform((len(digits), 1, 1, 1), digits) * self.contrast)
        cells = digits.pow(gamma).chunk(self.rows * self.columns)
        starts = range(0, len(cells), self.columns)
        rows = [torch.cat(cells[start : start + self.columns], dim=-1) for start in starts]
        return torch.cat(rows, dim=-2).reshape(images.shape)

    def _grid(self, digits: Tensor) -> Tensor:
        """Draw the sampling grid (n, h, h, 2) for ``torch.nn.functional.grid_sample``."""
        count, _, size, _ = digits.shape
        pixel = 2.0 / size
        angle = _uniform((count,), digits) * math.radians(self.degrees)
        stretch = 1 + _uniform((count, 2), digits) * self.scale
        shear = _uniform((count,), digits) * self.shear
        cos, sin = angle.cos(), angle.sin()
        row_x = torch.stack([cos * stretch[:, 0], shear - sin * stretch[:, 1]], dim=1)
        row_y = torch.stack([sin * stretch[:, 0], cos * stretch[:, 1]], dim=1)
        shift = _uniform((count, 2), digits) * self.shift * pixel
        theta = torch.cat([torch.stack([row_x, row_y], dim=1), shift[:, :, None]], dim=2)
        grid = F.affine_grid(theta, list(digits.shape), align_corners=False)
        bumps = _uniform((count, 2, 4, 4), digits) * self.elastic * pixel
        bumps = F.interpolate(bumps, size=(size, size), mode="bicubic", align_corners=True)
        return grid + bumps.permute(0, 2, 3, 1)


def _uniform(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device) * 2 - 1
