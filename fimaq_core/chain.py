"""A model as a chain of segments: the form in which it is calibrated, reconstructed and run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["patch_embed", "block", "merge", "head"]


@dataclass(frozen=True)
class NormPair:
    """A LayerNorm whose only consumer is the linear layer behind it, with what pads between them.

    Attributes:
        norm: the normalisation, with affine parameters.
        linear: name of the linear layer inside the segment's block.
        pad: name of the block's buffer of shape (channels,) that it pads with between norm and linear; None where it
            never pads there. Reparameterisation moves the pad value along. (A name: moving a module replaces its buffers.)
    """

    norm: nn.LayerNorm
    linear: str
    pad: str | None = None


@dataclass(frozen=True)
class MlpPart:
    """An MLP of a block: a module that computes ``fc2(act(fc1(x)))``.

    Attributes:
        name: of the module inside the segment's block.
        fc1, act, fc2: names of its parts.
    """

    name: str
    fc1: str = "fc1"
    act: str = "act"
    fc2: str = "fc2"


class Segment(nn.Module):
    """One reconstruction block and the frozen full-precision part before it.

    Attributes:
        label: the block's name in the original model, such as ``blocks.3``.
        before: maps the previous block's output to this block's input; stays in full precision.
        block: what is quantized.
        pairs: norm and linear pairs that can be reparameterised.
        mlps: the block's MLPs, for MLP reconstruction.
    """

    def __init__(
        self,
        label: str,
        kind: Kind,
        block: nn.Module,
        before: nn.Module | None = None,
        pairs: tuple[NormPair, ...] = (),
        mlps: tuple[MlpPart, ...] = (),
    ) -> None:
        super().__init__()
        self.label = label
        self.kind: Kind = kind
        self.before = before if before is not None else nn.Identity()
        self.block = block
        self.pairs = pairs
        self.mlps = mlps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.before(x))
        return out


class BlockChain(nn.Module):
    """Segments one after another; ``forward`` equals the original model's."""

    def __init__(self, segments: list[Segment]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.requires_grad_(False)
        self.eval()

    def __iter__(self) -> Iterator[Segment]:
        for segment in self.segments:
            assert isinstance(segment, Segment)
            yield segment

    def __len__(self) -> int:
        return len(self.segments)

    def segment(self, index: int) -> Segment:
        """The segment at ``index``."""
        found = self.segments[index]
        assert isinstance(found, Segment)
        return found

    def tail(self, start: int, x: Tensor) -> Tensor:
        """Run the segments from ``start`` to the end on the output of the segment before ``start``."""
        for index in range(start, len(self)):
            x = self.segment(index)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(0, x)
