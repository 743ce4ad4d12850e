"""Roundings in closed form: GPTQ and its asymmetric form GPTAQ.

GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) rounds the columns of a weight one after another.
The columns still free compensate each column's error, so that the layer's output on its quantized
inputs X̂ changes least. GPTAQ (Li et al., ICML 2025, arXiv:2504.02692) also compensates the change
of the inputs themselves: the target of each column's output is that on full-precision inputs X.

Both need second moments of the inputs only. No gradient and no step is taken, and the float weight
stays as it is. Differences from the released codes: weights of inputs that are always zero are
rounded to nearest (not set to zero), and GPTAQ's second term has the paper's weight 1 (the released
code multiplies it by 0.25, which the paper does not mention).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.calibration.conv_ranges import input_patches
from fimaq_core.calibration.refit import RoundingGrid
from fimaq_core.calibration.thinning import spread
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantConv2d, QuantConvTranspose2d, WeightLayer

#: Columns whose errors are fed forward to later columns together, as in GPTQ's paper.
_COLUMNS = 128
#: Most patches per image and call of a convolution, evenly spread; a classifier's has fewer.
_PATCHES = 2**12
#: A matrix counts as singular if a squared pivot is below this share of its mean diagonal.
_SINGULAR = 1e-12


class ClosedForm(NamedTuple):
    """Result of a closed form."""

    codes: Tensor  # (rows, d) float32 integers in [0, levels - 1]
    weight: Tensor  # (rows, d) float32, the compensated value at which each code was rounded
    damp: float  # the damping used: that asked for, or more if the moments were singular


class LayerMoments:
    """Sums over the inputs of a layer, one matrix (d, d) per group of a convolution.

    Attributes:
        square: ``X̂ᵀX̂`` per group, float64.
        pull: ``(X - X̂)ᵀX̂`` per group, float64; zero until full-precision inputs differ.
    """

    def __init__(self, layer: WeightLayer) -> None:
        self.layer, self.groups = layer, getattr(layer, "groups", 1)
        width, device = layer.weight[0].numel(), layer.weight.device
        shape = self.groups, width, width
        self.square = torch.zeros(shape, dtype=torch.float64, device=device)
        self.pull = torch.zeros_like(self.square)

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add inputs of one call.

        Args:
            x: inputs behind quantized layers, not yet quantized themselves.
            full: inputs of the same samples in full precision, of the same shape; None for the
                symmetric form.
        """
        if not x.numel():  # an image without proposals
            return
        x_hat = self.layer.input_quantizer(x)
        for group in range(self.groups):
            plain = None if full is None else _rows(self.layer, full, group)
            for hat in _rows(self.layer, x_hat, group):
                own = hat.double()
                self.square[group] += own.t() @ own
                if plain is not None:
                    self.pull[group] += (next(plain).double() - own).t() @ own


def round_layer(moments: LayerMoments, damp: float, *, asymmetric: bool) -> ClosedForm:
    """Return the closed form of a layer whose weight has its range.

    ``damp`` and errors are as in :func:`closed_form`.
    """
    layer, quantizer = moments.layer, moments.layer.weight_quantizer
    parts = (layer.weight.detach().flatten(1), quantizer.scale, quantizer.zero_point)
    found = []
    for group, own in enumerate(zip(*(part.chunk(moments.groups) for part in parts), strict=True)):
        weight, scale, zero = own
        grid, square = RoundingGrid(scale, zero, quantizer.levels), moments.square[group]
        pull = moments.pull[group] if asymmetric else None
        found.append(closed_form(weight, grid, square=square, pull=pull, damp=damp))
    codes, weights, damps = zip(*found, strict=True)
    return ClosedForm(torch.cat(codes), torch.cat(weights), max(damps))


def closed_form(
    weight: Tensor, grid: RoundingGrid, *, square: Tensor, pull: Tensor | None = None, damp: float
) -> ClosedForm:
    """Round a weight by GPTQ, or by GPTAQ if there is a ``pull``.

    Columns are rounded in the order of falling diagonal entries of ``H = X̂ᵀX̂ + λI``, with λ =
    ``damp`` times the mean diagonal of ``X̂ᵀX̂``. With ``H⁻¹ = UᵀU`` (U upper triangular), rounding
    column q from w to ŵ changes the later columns by ``-(w - ŵ) / U_qq U_q``, and in GPTAQ also by
    ``w P_q`` with ``P = triu((X - X̂)ᵀX̂ Uᵀ, 1) U``: of all changes, this one brings the layer's
    output on X̂ nearest to what it would be with column q unrounded and on full-precision inputs.

    Args:
        weight: (rows, d).
        grid: scales, zero points and number of levels of the rows.
        square: (d, d) float64, ``X̂ᵀX̂``.
        pull: (d, d) float64, ``(X - X̂)ᵀX̂``.
        damp: share of the mean diagonal; multiplied by 10 until the matrix is regular.

    Raises:
        NumericsError: the moments are NaN or infinite.
    """
    if not all(bool(one.isfinite().all()) for one in (square, pull) if one is not None):
        raise NumericsError("its inputs are NaN or infinite: check images and weights.")
    order = square.diagonal().argsort(descending=True, stable=True)
    upper, damp = _inverse_factor(square[order][:, order], damp)
    # Row q: what one unit of column q's error, or of its value, adds to the later columns.
    feed = -upper / upper.diagonal()[:, None]
    drift = torch.zeros_like(upper)
    if pull is not None:
        drift = (pull[order][:, order] @ upper.t()).triu(1) @ upper
    scale, zero = grid.scale.detach().double(), grid.zero_point.double()
    free = weight.detach().double()[:, order]
    codes, errors = torch.empty_like(free), torch.empty_like(free)
    width = free.shape[1]
    for start in range(0, width, _COLUMNS):
        stop = min(start + _COLUMNS, width)
        for q in range(start, stop):
            now, later = free[:, q : q + 1], slice(q + 1, stop)
            codes[:, q : q + 1] = ((now / scale).round() + zero).clamp(0, grid.levels - 1)
            errors[:, q : q + 1] = now - (codes[:, q : q + 1] - zero) * scale
            free[:, later] += errors[:, q : q + 1] * feed[q, later]
            if pull is not None:
                free[:, later] += now * drift[q, later]
        own = slice(start, stop)
        free[:, stop:] += errors[:, own] @ feed[own, stop:]
        if pull is not None:
            free[:, stop:] += free[:, own] @ drift[own, stop:]
    back = order.argsort()
    return ClosedForm(codes[:, back].float(), free[:, back].float(), damp)


def _inverse_factor(square: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return the upper triangular U with ``(square + λI)⁻¹ = UᵀU``, and the damping used."""
    mean = float(square.diagonal().mean())
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    if mean == 0:
        return eye, damp  # no input at all: every column is rounded to nearest
    while True:
        # With rows and columns in reverse, the lower factor is R with square + λI = R Rᵀ, R upper.
        matrix = (square + damp * mean * eye).flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info) and bool((lower.diagonal().square() > _SINGULAR * mean).all()):
            factor = lower.flip(0, 1)
            return torch.linalg.solve_triangular(factor, eye, upper=True), damp
        damp *= 10


def _rows(layer: WeightLayer, x: Tensor, group: int) -> Iterator[Tensor]:
    """Yield the rows (n, d) that the weight's rows multiply: tokens, or an image's patches."""
    if not isinstance(layer, QuantConv2d | QuantConvTranspose2d):
        yield x.reshape(-1, x.shape[-1])
        return
    for image in torch.split(x, 1):
        if isinstance(layer, QuantConv2d):
            patches = input_patches(layer, image, group)
        else:
            patches = _transposed_patches(layer, image)
        yield patches[spread(len(patches), _PATCHES, x.device)]


def _transposed_patches(layer: QuantConvTranspose2d, x: Tensor) -> Tensor:
    """Return the patches that the kernels of a transposed convolution multiply, as rows.

    A transposed convolution is a convolution of the input with zeros between its elements, with a
    turned kernel and without stride.
    """
    (height, width), stride, dilation = x.shape[2:], layer.stride, layer.dilation
    wide = x.new_zeros(*x.shape[:2], (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1)
    wide[:, :, :: stride[0], :: stride[1]] = x
    around = []
    for dim in (1, 0):  # from the last dimension, as padding is given
        edge = dilation[dim] * (layer.kernel_size[dim] - 1) - int(layer.padding[dim])
        around += [edge, edge + layer.output_padding[dim]]
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    columns = F.unfold(F.pad(wide, around), kernel, dilation=(dilation[0], dilation[1]))
    turned = columns.view(x.shape[1], kernel[0] * kernel[1], -1).flip(1)
    return turned.flatten(0, 1).t()
