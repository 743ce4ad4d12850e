"""A model as a chain of segments, for calibration, reconstruction and evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fimaq_core.samples import Samples

#: ``head`` is a classifier, whose loss compares probabilities. ``projection`` maps pooled features
#: to an embedding. A ``neck`` is always reconstructed by squared error. A ``predictor`` is
#: calibrated and never reconstructed.
Kind = Literal["patch_embed", "block", "merge", "head", "projection", "neck", "predictor"]

#: Tensors that earlier blocks keep for later ones, in order, each (B, ...).
Kept = tuple[Tensor, ...]


class Beside(NamedTuple):
    """Tensors of all samples that later segments need besides the previous block's output."""

    side: Samples | None = None  # the chain's side, (n, ...); None for a chain without one
    kept: tuple[Samples, ...] = ()  # tensors that earlier segments keep, each (n, ...)

    def rows(self, rows: slice, device: torch.device | None = None) -> tuple[Tensor | None, Kept]:
        """Return side and kept tensors of a batch, on ``device`` if one is given."""

        def batch(samples: Samples) -> Tensor:
            found = samples[rows]
            return found if device is None else found.to(device, non_blocking=True)

        side = None if self.side is None else batch(self.side)
        return side, tuple(batch(one) for one in self.kept)


@dataclass(frozen=True)
class NormPair:
    """A LayerNorm whose only consumer is the linear layer behind it."""

    norm: nn.LayerNorm  # the normalisation, with affine parameters
    linear: str  # name of the linear layer inside the segment's block
    #: name of the block's buffer (channels,) of padding between the two, which reparameterisation
    #: changes too; None without padding. (A name, since moving a module replaces its buffers.)
    pad: str | None = None


@dataclass(frozen=True)
class MlpPart:
    """An MLP of a block: a module that computes ``fc2(act(fc1(x)))``."""

    name: str  # name of the module inside the segment's block
    fc1: str = "fc1"  # name of the first linear layer inside the MLP
    act: str = "act"  # name of the activation
    fc2: str = "fc2"  # name of the second linear layer
    #: classes that count as GELU in this kind of model; only these are replaced
    gelu: tuple[type[nn.Module], ...] = (nn.GELU,)


class Segment(nn.Module):
    """A block, and the full-precision part between the previous block and this one.

    Example::

        Segment("blocks.0", "block", block, pairs=(NormPair(block.norm1, "attn.qkv"),))

    Attributes:
        label: the block's name in the original model, such as ``blocks.3``.
        kind: kind of the segment.
        block: the part that is quantized.
        before: full-precision map from the previous block's output to this block's input.
        pairs: norm and linear pairs that can be reparameterised.
        mlps: the block's MLPs, for MLP reconstruction.
        takes_side: True if ``before`` takes the chain's side as its second argument.
        keep: full-precision map from the block's output to a tensor (B, ...) for later segments,
            such as a stage's output for a neck; None if this segment keeps nothing.
        takes_kept: True if ``before`` takes the kept tensors as its last argument.
    """

    def __init__(
        self,
        label: str,
        kind: Kind,
        block: nn.Module,
        before: nn.Module | None = None,
        pairs: tuple[NormPair, ...] = (),
        mlps: tuple[MlpPart, ...] = (),
        takes_side: bool = False,
        keep: nn.Module | None = None,
        takes_kept: bool = False,
    ) -> None:
        super().__init__()
        self.label, self.pairs, self.mlps = label, pairs, mlps
        self.kind: Kind = kind
        # The order of these modules is the order of tensors in checkpoints.
        self.before = before if before is not None else nn.Identity()
        self.block, self.keep = block, keep
        self.takes_side, self.takes_kept = takes_side, takes_kept

    def enter(self, x: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        """Return the block's input (B, ...) for the previous block's output ``x``."""
        extra: list[Tensor | Kept | None] = [side] if self.takes_side else []
        out: Tensor = self.before(x, *extra, *([kept] if self.takes_kept else []))
        return out

    def feature(self, x: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        """Return the input (B, ...) of a classifier or projection, for the previous output ``x``.

        A head that pools first is a Sequential whose last part is the classifier. Before a
        predictor the feature is ``x`` itself.
        """
        if self.kind == "predictor":
            return x
        x = self.enter(x, side, kept)
        return self.block[:-1](x) if isinstance(self.block, nn.Sequential) else x

    def kept_with(self, output: Tensor, kept: Kept) -> Kept:
        """Return ``kept``, with the tensor that this segment keeps for its ``output`` (B, ...)."""
        return kept if self.keep is None else (*kept, self.keep(output))

    def forward(self, x: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        out: Tensor = self.block(self.enter(x, side, kept))
        return out


class BlockChain(nn.Module):
    """Segments one after another; ``forward`` equals the original model's.

    ``side`` maps the chain's input to the tensor (B, ...) that segments with ``takes_side`` need,
    such as the position of the token to pool; None if no segment needs one.
    """

    def __init__(self, segments: list[Segment], side: nn.Module | None = None) -> None:
        super().__init__()
        self.segments, self.side = nn.ModuleList(segments), side
        self.requires_grad_(False)
        self.eval()

    def __iter__(self) -> Iterator[Segment]:
        return (self.segment(index) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.segments)

    def segment(self, index: int) -> Segment:
        """Return the segment at ``index``."""
        found = self.segments[index]
        assert isinstance(found, Segment)
        return found

    def side_of(self, x: Tensor) -> Tensor | None:
        """Return the side of the chain's inputs ``x`` (B, ...); None for a chain without one."""
        return None if self.side is None else self.side(x)

    @property
    def feature_end(self) -> int:
        """Number of the segment behind the penultimate feature: the last head or projection.

        A chain without one has its first predictor there, or its end.
        """
        kinds = [segment.kind for segment in self]
        heads = [index for index, kind in enumerate(kinds) if kind in ("head", "projection")]
        if heads:
            return heads[-1]
        return kinds.index("predictor") if "predictor" in kinds else len(kinds)

    def tail(
        self,
        start: int,
        x: Tensor,
        side: Tensor | None = None,
        kept: Kept = (),
        *,
        feature: bool = False,
    ) -> Tensor:
        """Run the segments from ``start`` to the end on the output ``x`` of segment start - 1.

        With ``feature`` the result is the penultimate feature (B, ...) instead of the output.
        """
        end = self.feature_end if feature else len(self)
        for index in range(start, end):
            segment = self.segment(index)
            x = segment(x, side, kept)
            kept = segment.kept_with(x, kept)
        return x if end == len(self) else self.segment(end).feature(x, side, kept)

    def rest(
        self,
        index: int,
        x: Tensor,
        side: Tensor | None = None,
        kept: Kept = (),
        *,
        feature: bool = False,
    ) -> Tensor:
        """Return the model's output, or its feature, for output ``x`` of block ``index``.

        ``kept`` are the tensors that segments before the block keep.
        """
        kept = self.segment(index).kept_with(x, kept)
        return self.tail(index + 1, x, side, kept, feature=feature)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(0, x, self.side_of(x))
