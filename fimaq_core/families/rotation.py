"""Rotation of residual streams and heads by Hadamard matrices, folded into the weights.

Rotations spread outliers over all channels, so low bits lose less; the float function is unchanged
up to rounding (QuaRot: Ashkboos et al., NeurIPS 2024, arXiv:2404.00456).

A residual stream x becomes Q x. Layers that add to the stream get Q in front of their weight.
Layers that read it, through a LayerNorm, get the norm's weight and bias and Qᵀ into their weight.
Q maps the vector of ones to itself, so Q keeps the mean of a token's channels, and LayerNorm
without affine part commutes with Q: LN(Q x) = Q LN(x). The norm stays a LayerNorm, and the tokens
need not be centred. Centring them, to replace the norm by an RMS norm, is not exact in Swin: its
patch merging normalises four tokens together, whose means differ.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.recipe import Recipe


def hadamard(size: int) -> Tensor | None:
    """Return a Hadamard matrix (size, size) of entries ±1, float64, or None if none is known here.

    It is H_m ⊗ H_{2^k}, with m = 1 or the smallest m that Paley's constructions give (12, 20, 28,
    36, ...): Paley, J. Math. Phys. 12 (1933).
    """
    for power in range((size & -size).bit_length() - 1, -1, -1):
        order = size >> power
        core = torch.ones(1, 1, dtype=torch.float64) if order == 1 else _paley(order)
        if core is not None:
            for _ in range(power):
                core = torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double())
            return core
    return None


def _paley(order: int) -> Tensor | None:
    """Return Paley's matrix from the squares modulo a prime, order - 1 or order / 2 - 1, or None.

    The prime is 3 modulo 4 in the first construction and 1 modulo 4 in the second.
    """
    if order % 4:
        return None
    for prime, first in ((order - 1, True), (order // 2 - 1, False)):
        fits = prime % 4 == (3 if first else 1)
        if not fits or any(prime % one == 0 for one in range(2, math.isqrt(prime) + 1)):
            continue
        squares = {one * one % prime for one in range(1, prime)}
        signs = [0.0] + [1.0 if one in squares else -1.0 for one in range(1, prime)]
        places = torch.arange(prime)
        core = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
        core[1:, 1:] = torch.tensor(signs).double()[(places[:, None] - places) % prime]
        core[0, 0] = 0.0
        eye = torch.eye(prime + 1, dtype=torch.float64)
        if first:
            core[1:, 0] = -1.0
            return core + eye
        return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()) + torch.kron(
            eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        )
    return None


def randomised(size: int) -> Tensor | None:
    """Return an orthogonal matrix (size, size), float64, of entries ±1/√size, or None.

    It is a Hadamard matrix with signs for its rows and columns, None if no such matrix is known
    here. The signs are bits of SHAKE-256 of the size: the same on every machine and with every
    version.
    """
    matrix = hadamard(size)
    if matrix is None:
        return None
    bits = hashlib.shake_256(f"rotation of {size} channels".encode()).digest(2 * size)
    signs = 1.0 - 2.0 * torch.tensor([byte & 1 for byte in bits], dtype=torch.float64)
    turned: Tensor = signs[:size, None] * matrix * signs[size:] / size**0.5
    return turned


def rotation(width: int) -> Tensor:
    """Return the rotation Q (width, width), float64, of a stream: orthogonal, with Q 1 = 1.

    It is :func:`randomised`, then the reflection that maps the image of the ones back to the ones.
    The reflection changes entries of size 1/√width by about 1/width. Q depends on the width alone.

    Raises:
        ModelError: no Hadamard matrix of this size is known here.
    """
    start = randomised(width)
    if start is None:
        raise ModelError(
            f"A stream of {width} channels cannot be rotated, since no Hadamard matrix of this "
            "size is known: set rotate to none."
        )
    normal = start.sum(1) - 1.0
    length = normal.square().sum()
    return start if length < 1e-9 else start - normal[:, None] * (normal @ start) * (2 / length)


def not_rotated(what: str) -> ModelError:
    """Return the error for a model that cannot be rotated; ``what`` says what it has."""
    return ModelError(f"A model with {what} cannot be rotated: set rotate to none.")


class Turn(nn.Module):
    """Rotation x Qᵀ of tokens (..., width): the one product that no weight can take, in float.

    It stands where a stream starts behind a norm: after ``ln_pre`` of CLIP (``norm_pre`` of timm),
    and after the norm of Swin's patch embedding. Each channel of the norm's output has its own
    factor, so Q cannot move in front of the norm; and the stream itself is added to later, so Q
    cannot move behind it.
    """

    matrix: Tensor  # (width, width), the transposed Q

    def __init__(self, width: int) -> None:
        super().__init__()
        matrix = rotation(width).t().contiguous().to(torch.get_default_dtype())
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Stream:
    """Residual stream (..., width) that the recipe may rotate; its methods fold Q into weights.

    Every layer that writes to the stream or reads it has to be passed to one of the methods, once.
    If the recipe does not ask for a rotation, the methods do nothing.

    Example::

        stream = Stream(384, recipe)
        stream.write(patch_embed.proj)
        stream.block(block)
        stream.read(norm, head)
    """

    def __init__(self, width: int, recipe: Recipe) -> None:
        self.width, self.on = width, recipe.rotate == "hadamard"
        self._turn = rotation(width) if self.on else torch.empty(0)

    def start(self, embedding: nn.Module, norm: nn.Module) -> nn.Module:
        """Return ``embedding`` followed by :class:`Turn` if ``norm`` at its end needs that.

        ``norm`` is a norm whose output is the stream, or ``nn.Identity``.
        """
        turned = self.on and not isinstance(norm, nn.Identity)
        return nn.Sequential(embedding, Turn(self.width)) if turned else embedding

    @torch.no_grad()
    def write_tokens(self, *tokens: Tensor | None) -> None:
        """Rotate tokens or position embeddings (..., width) in place."""
        for token in tokens if self.on else ():
            if token is not None:
                token.copy_(_exact(token) @ self._turn.t())

    @torch.no_grad()
    def write(self, layer: nn.Module, scale: nn.Module | None = None) -> None:
        """Fold Q into a layer that writes to the stream, after its LayerScale ``scale`` if any."""
        if not self.on:
            return
        weight, bias = layer.get_parameter("weight"), layer.bias
        turn = self._turn
        if scale is not None and not isinstance(scale, nn.Identity):
            turn = turn * _exact(scale.get_parameter("gamma"))
        weight.copy_((turn @ _exact(weight).flatten(1)).view_as(weight))
        if isinstance(bias, Tensor):
            bias.copy_(turn @ _exact(bias))

    @torch.no_grad()
    def read(
        self,
        norm: nn.Module,
        *layers: nn.Module,
        copies: int = 1,
        by_channel: bool = False,
        pad: Tensor | None = None,
    ) -> None:
        """Fold norm and Qᵀ into linear layers or 1 x 1 convolutions, the only ones behind ``norm``.

        Afterwards the norm has the weight 1 and the bias 0, so it can be reparameterised as before.

        Args:
            norm: LayerNorm with or without parameters, or ``nn.Identity``.
            layers: all layers that read its output; a missing bias is created.
            copies: tokens that are concatenated before the norm, 4 in Swin's patch merging.
            by_channel: True if the first channel of all these tokens comes first (mmdet), False if
                the first token comes first (timm).
            pad: (width,) value padded between norm and layer, changed in place.

        Raises:
            ModelError: the norm is of another kind, or a channel's weight is 0 where ``pad`` needs
                its inverse.
        """
        if not self.on:
            return
        weight, shift = _affine(norm, copies * self.width)
        for layer in layers:
            found = layer.get_parameter("weight")
            rows = _exact(found).flatten(1)
            if by_channel:
                split = (rows * weight).view(len(rows), self.width, copies)
                turned = self._turn @ split
            else:
                split = (rows * weight).view(len(rows), copies, self.width)
                turned = split @ self._turn.t()
            if shift is not None:
                _add_bias(layer, rows @ shift)
            found.copy_(turned.reshape(found.shape))
        if pad is not None and shift is not None:
            if ((weight == 0) & (shift != 0)).any():
                raise not_rotated("a weight of 0 in a norm before padded windows")
            # A padded token has to give what zeros gave: W diag(weight) Qᵀ pad = -W shift.
            pad.copy_(-self._turn @ (shift / torch.where(weight == 0, 1.0, weight)))
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if isinstance(parameter := getattr(norm, name, None), Tensor):
                parameter.fill_(value)

    def block(
        self,
        block: nn.Module,
        *,
        norms: tuple[str, str] = ("norm1", "norm2"),
        mlp: tuple[str, str] = ("fc1", "fc2"),
        scales: tuple[str, str] = ("ls1", "ls2"),
        pad: Tensor | None = None,
    ) -> None:
        """Rotate a pre-norm block with ``attn`` (``qkv``, ``proj``) and ``mlp``, and its heads.

        The arguments name its norms, the layers of its MLP and its LayerScales, which become
        ``nn.Identity``. ``pad`` is as in :meth:`read`, for the first norm.
        """
        if not self.on:
            return
        attention = block.get_submodule("attn")
        parts = [
            (attention.get_submodule("qkv"), attention.get_submodule("proj"), pad),
            (block.get_submodule(f"mlp.{mlp[0]}"), block.get_submodule(f"mlp.{mlp[1]}"), None),
        ]
        for norm, scale, (reader, writer, value) in zip(norms, scales, parts, strict=True):
            self.read(block.get_submodule(norm), reader, pad=value)
            self.write(writer, getattr(block, scale, None))
            if hasattr(block, scale):
                setattr(block, scale, nn.Identity())
        rotate_heads(attention)


@torch.no_grad()
def rotate_heads(attention: nn.Module) -> None:
    """Rotate queries and keys alike, and values, of each head of an attention with ``qkv``.

    The rotation cancels in q kᵀ, and in ``proj`` behind the values. Queries and keys are left if
    they have norms; values are left if a norm precedes ``proj``; all are left if no Hadamard matrix
    has the size of a head.
    """
    qkv, proj = attention.get_submodule("qkv"), attention.get_submodule("proj")
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    weight = qkv.get_parameter("weight")
    turn = randomised(len(weight) // (3 * heads))
    if turn is None:
        return

    def plain(name: str) -> bool:
        return isinstance(getattr(attention, name, nn.Identity()), nn.Identity)

    turned = [0, 1] if plain("q_norm") and plain("k_norm") else []
    if plain("norm"):
        turned.append(2)
        columns = proj.get_parameter("weight")
        rows = _exact(columns).view(len(columns), heads, len(turn)) @ turn.t()
        columns.copy_(rows.view_as(columns))
    for value in (weight, qkv.bias):
        if isinstance(value, Tensor):
            parts = _exact(value).view(3, heads, len(turn), -1)
            parts[turned] = turn @ parts[turned]
            value.copy_(parts.view_as(value))


def _affine(norm: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    """Return weight (width,) and bias, if any, of a norm. Raises ModelError for other kinds."""
    if isinstance(norm, nn.LayerNorm):
        if norm.normalized_shape != (width,):
            raise ModelError(f"A norm over {norm.normalized_shape} is not over {width} channels.")
    elif not isinstance(norm, nn.Identity):
        raise not_rotated(f"norms of type {type(norm).__name__}, which are not LayerNorm,")
    values = getattr(norm, "weight", None), getattr(norm, "bias", None)
    weight, bias = (None if one is None else _exact(one) for one in values)
    return torch.ones(width, dtype=torch.float64) if weight is None else weight, bias


def _add_bias(layer: nn.Module, added: Tensor) -> None:
    """Add to a layer's bias (out,), which is created if the layer has none."""
    if layer.bias is None:
        weight = layer.get_parameter("weight")
        bias = nn.Parameter(added.to(weight), requires_grad=False)
        layer.register_parameter("bias", bias)
    else:
        bias = layer.get_parameter("bias")
        bias.copy_(_exact(bias) + added)


def _exact(value: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU in float64, where products are exact enough."""
    return value.detach().to("cpu", torch.float64, copy=True)
