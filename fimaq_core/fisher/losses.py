"""Block losses: squared error weighted by approximations of the Fisher information.

All functions are pure, and losses are scalars. Symbols: Δ is the block's output error, flattened to
(B, N) if not said otherwise; the mean absolute gradients g and mean absolute errors d of k Fisher
passes are the rows of G and D, (k, N). Sources: FIMA-Q (Wu et al., CVPR 2025, arXiv:2506.11543) and
its released code; BRECQ's squared gradient (Li et al., ICLR 2021) for ``fisher_brecq``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.errors import RecipeError
from fimaq_core.recipe import LOSSES, UNDIVIDED
from fimaq_core.settings import THROUGH_REST

#: Least eigenvalue of D Dᵀ, as share of the largest; smaller ones are raised to it. So the
#: condition of D Dᵀ is at most 1e8.
DAMPING = 1e-8


def squared_error(delta: Tensor) -> Tensor:
    """Return ``mean over samples of Σ Δ²``."""
    return delta.square().sum(1).mean()


def axis_error(delta: Tensor) -> Tensor:
    """Return Σ Δ² over axis 1, averaged over the other axes, of Δ (B, ...) in its own shape.

    This is the squared error of BRECQ's code and its descendants, such as those of AdaLog and
    PD-Quant. Axis 1 holds the tokens of a ViT, the rows of a Swin's map and the classes of a head.
    """
    return delta.square().sum(1).mean()


def absolute_error(delta: Tensor) -> Tensor:
    """Return ``mean over samples of Σ |Δ|``."""
    return delta.abs().sum(1).mean()


def squared_gradient_loss(delta: Tensor, gradient: Tensor) -> Tensor:
    """Return ``mean(Δ² g²)`` with one gradient per sample, (B, N)."""
    return (delta * gradient).square().mean()


def diagonal_loss(delta: Tensor, diagonal: Tensor) -> Tensor:
    """Return ``mean(Δ² · h)`` with h (N,) or (B, N).

    For FIMA-Q h is the mean of the k absolute gradients. For APHQ-ViT (Wu et al., CVPR 2025,
    arXiv:2504.02508) h is the perturbation Hessian, one per sample or the mean of all.
    """
    return (delta.square() * diagonal).mean()


def least_squares_loss(delta: Tensor, diagonal: Tensor, direction: Tensor) -> Tensor:
    """Return ``mean over samples of ½ Σ h Δ² + ½ (uᵀΔ)²`` with h and u (N,) (LS-ViT, CVPR 2026)."""
    return 0.5 * ((delta.square() @ diagonal) + (delta @ direction).square()).mean()


def rank_one_loss(delta: Tensor, gradient: Tensor) -> Tensor:
    """Return ``mean over samples of (mean_N |Δ| g)²``, g (N,) the mean of k absolute gradients.

    The released code runs this loss for k = 1 only; the mean of G is our generalisation.
    """
    return (delta.abs() @ gradient / delta.shape[1]).square().mean()


def low_rank_loss(delta: Tensor, gradients: Tensor, root: Tensor) -> Tensor:
    """Return ``mean over samples of A M Aᵀ``, A = |Δ| Gᵀ (B, k), M = (D Dᵀ)⁻¹ = root rootᵀ (k, k).

    It is computed as the squared length of ``A root``, which cannot be negative.
    """
    return (delta.abs() @ gradients.t() @ root).square().sum(1).mean()


def inverse_gram_root(errors: Tensor) -> tuple[Tensor, bool]:
    """Return a root R (k, k), float32, of ``(D Dᵀ)⁻¹ = R Rᵀ``, and True if it was damped.

    The k mean errors of a block are similar, so D Dᵀ is near singular, or singular if the block was
    the same in two passes. Eigenvalues (in float64) are raised to at least :data:`DAMPING` times
    the largest one. R is zero if D is zero.
    """
    wide = errors.double()
    values, vectors = torch.linalg.eigh(wide @ wide.t())
    top = values[-1]
    if top <= 0:
        return torch.zeros_like(vectors, dtype=torch.float32), True
    floor = top * DAMPING
    root = vectors / values.clamp(min=floor).sqrt()
    return root.float(), bool(values[0] < floor)


#: Losses of the output error alone, (B, N) to a scalar, by name.
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"mse": squared_error, "mae": absolute_error}


def register_loss(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    """Add a loss: a function of Δ (B, N). Raises RecipeError if the name is taken."""
    if name in LOSSES:
        raise RecipeError(f"A loss named '{name}' exists already: choose another name.")
    PLAIN[name] = loss
    LOSSES.append(name)


def takes_passes(name: str) -> bool:
    """Return True if the loss ``name`` needs passes of the divergence over the samples."""
    return name not in (*PLAIN, *THROUGH_REST, *UNDIVIDED)
