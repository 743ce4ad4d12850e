"""A model as a chain of segments: the form in which it is calibrated, reconstructed and run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fimaq_core.samples import Samples

#: ``head`` is a classifier, whose loss compares probabilities; ``projection`` maps pooled features
#: to an embedding; a ``neck`` is reconstructed by squared error whatever the recipe's loss; a
#: ``predictor`` is calibrated and never reconstructed.
Kind = Literal["patch_embed", "block", "merge", "head", "projection", "neck", "predictor"]

#: What earlier blocks keep for later ones, in order, each (B, ...).
Kept = tuple[Tensor, ...]


class Beside(NamedTuple):
    """What travels beside the outputs of a chain's blocks, of all samples."""

    side: Samples | None = None  # the chain's side, (n, ...); None where it has none
    kept: tuple[Samples, ...] = ()  # what the segments before keep, each (n, ...)

    def rows(self, rows: slice, device: torch.device | None = None) -> tuple[Tensor | None, Kept]:
        """Side and kept tensors of a batch, on ``device`` if one is given."""

        def batch(samples: Samples) -> Tensor:
            found = samples[rows]
            return found if device is None else found.to(device, non_blocking=True)

        return None if self.side is None else batch(self.side), tuple(
            batch(one) for one in self.kept
        )


@dataclass(frozen=True)
class NormPair:
    """A LayerNorm whose only consumer is the linear layer behind it, with what pads between them."""

    norm: nn.LayerNorm  # the normalisation, with affine parameters
    linear: str  # name of the linear layer inside the segment's block
    #: name of the block's buffer (channels,) that pads between the two, which reparameterisation
    #: changes too; None where nothing pads. (A name, since moving a module replaces its buffers.)
    pad: str | None = None


@dataclass(frozen=True)
class MlpPart:
    """An MLP of a block: a module that computes ``fc2(act(fc1(x)))``."""

    name: str  # of the module inside the segment's block
    #: names of its parts
    fc1: str = "fc1"
    act: str = "act"
    fc2: str = "fc2"
    #: classes that count as GELU in this kind of model; only these are replaced
    gelu: tuple[type[nn.Module], ...] = (nn.GELU,)


class Segment(nn.Module):
    """One reconstruction block and the frozen full-precision part before it.

    Attributes:
        takes_side: whether ``before`` takes the chain's side as its second argument.
        takes_kept: whether ``before`` takes what the segments before keep as its last argument.
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
        self.label = label  # the block's name in the original model, such as ``blocks.3``
        self.kind: Kind = kind
        #: maps the previous block's output to this block's input; stays in full precision
        self.before = before if before is not None else nn.Identity()
        self.block = block  # what is quantized
        self.pairs = pairs  # norm and linear pairs that can be reparameterised
        self.mlps = mlps  # the block's MLPs, for MLP reconstruction
        self.takes_side, self.takes_kept = takes_side, takes_kept
        #: maps the block's output to what later segments need of it, such as a stage's output for a
        #: neck, (B, ...); stays in full precision. None where they need nothing
        self.keep = keep

    def enter(self, x: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        """The block's input (B, ...) for the previous block's output ``x``, by ``before``."""
        extra: list[Tensor | Kept | None] = [side] if self.takes_side else []
        out: Tensor = self.before(x, *extra, *([kept] if self.takes_kept else []))
        return out

    def kept_with(self, output: Tensor, kept: Kept) -> Kept:
        """``kept`` and what this segment keeps of its block's ``output`` (B, ...)."""
        return kept if self.keep is None else (*kept, self.keep(output))

    def forward(self, x: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        out: Tensor = self.block(self.enter(x, side, kept))
        return out


class BlockChain(nn.Module):
    """Segments one after another; ``forward`` equals the original model's."""

    def __init__(self, segments: list[Segment], side: nn.Module | None = None) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        #: maps the chain's input to what segments with ``takes_side`` need of it, (B, ...), such as
        #: the position of the token to pool. None where there is no such thing
        self.side = side
        self.requires_grad_(False)
        self.eval()

    def __iter__(self) -> Iterator[Segment]:
        return (self.segment(index) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.segments)

    def segment(self, index: int) -> Segment:
        """The segment at ``index``."""
        found = self.segments[index]
        assert isinstance(found, Segment)
        return found

    def side_of(self, x: Tensor) -> Tensor | None:
        """The side of the chain's inputs ``x`` (B, ...); None if it has none."""
        return None if self.side is None else self.side(x)

    def tail(self, start: int, x: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        """Run the segments from ``start`` to the end, on the output ``x`` of the one before."""
        for index in range(start, len(self)):
            segment = self.segment(index)
            x = segment(x, side, kept)
            kept = segment.kept_with(x, kept)
        return x

    def rest(
        self, index: int, output: Tensor, side: Tensor | None = None, kept: Kept = ()
    ) -> Tensor:
        """The model's output for that of block ``index``; ``kept`` by the segments before it."""
        return self.tail(index + 1, output, side, self.segment(index).kept_with(output, kept))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(0, x, self.side_of(x))
