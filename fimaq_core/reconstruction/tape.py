"""The tape: inputs and outputs of the present block over all calibration images, each computed once.

Block i's output is block i + 1's input, so walking forward costs two forwards a block (full precision and quantized)
whatever the depth. Memory: at most five tensors of images x block output (input and output in full precision, the
quantized prefix's input, and the next two while advancing), and twice what segments keep for later ones, on the device, in
host memory or memory-mapped.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fimaq_core.chain import Beside, BlockChain
from fimaq_core.layers import set_quantized
from fimaq_core.numerics import Arithmetic, arithmetic
from fimaq_core.reconstruction.figures import OutputError
from fimaq_core.samples import Ragged, Samples, batches, joined, slices

Placement = Literal["device", "host", "disk"]


class Storage:
    """Makes the tape's tensors, in one of three places.

    Args:
        placement: ``device`` (fastest), ``host`` memory, or ``disk`` (memory-mapped temporary files).
        device: the computing device.
        pinned: whether host memory is pinned for a GPU: few large tensors gain by it, while of many small ones each is rounded up
            to a power of two.
    """

    def __init__(self, placement: Placement, device: torch.device, pinned: bool = True) -> None:
        self.placement, self.device, self.pinned = placement, device, pinned and device.type == "cuda"
        self._folder = tempfile.TemporaryDirectory(prefix="fimaq-tape-") if placement == "disk" else None
        self._count = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in this place."""
        if self.placement == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self._folder is None:
            return torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.bin"
        size = int(torch.Size(shape).numel())
        # Else a full disk would show as a signal that ends the process, once the tensor is written.
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size * dtype.itemsize, 1))
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        path.unlink()  # the mapping keeps the data; the space is freed with the tensor
        return mapped.view(shape)


class Tape:
    """Position of a walk over a chain.

    Args:
        chain: what is quantized, block by block.
        images: (n, ...) inputs of the chain; those of varying shapes pass one by one, and all that is here varies with them.
        storage: where tensors go.
        with_prefix: whether the quantized prefix's outputs are asked for.
        batch_size: images a forward pass.
        frozen_dtype: arithmetic of full-precision parts.
        teacher: the full-precision model, of the same segments; None if that is ``chain`` itself in full precision.

    Attributes:
        index: number of the present block.
        teacher: the full-precision model; ``chain`` itself, or what it was before its MLPs were changed.
        full: (n, ...) the present block's inputs in the full-precision model.
        prefix: the same with everything before quantized, or None where nobody asks for it.
        target: (n, ...) the present block's full-precision outputs; None until :meth:`compute_target`.
        outputs: (n, ...) the present block's quantized outputs after the quantized prefix; None until :meth:`measure` keeps them.
        beside: what travels beside ``full``: the chain's side of all inputs, and what the segments before have kept.
        beside_prefix: the same beside ``prefix``.
    """

    def __init__(
        self,
        chain: BlockChain,
        images: Samples,
        storage: Storage,
        *,
        with_prefix: bool,
        batch_size: int = 32,
        frozen_dtype: Arithmetic = "float32",
        teacher: BlockChain | None = None,
    ) -> None:
        self.chain, self.storage, self.batch_size, self.frozen_dtype = chain, storage, batch_size, frozen_dtype
        self.teacher = chain if teacher is None else teacher
        self.index = 0
        self.beside = self.beside_prefix = Beside(self._side(images))
        self.full = self._enter(self.teacher, images, self.beside)
        # Nothing is quantized before the first block.
        self.prefix: Samples | None = self.full if with_prefix else None
        self.target: Samples | None = None
        self.outputs: Samples | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all samples that are kept now, shared ones counted once."""
        parts = (self.full, self.prefix, self.target, self.outputs, *self.beside.kept)
        parts += (*self.beside_prefix.kept, self.beside.side)
        tensors = [tensor for part in parts if part is not None for tensor in (part if isinstance(part, Ragged) else [part])]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def compute_target(self) -> Samples:
        """Run the present block in full precision, once; its layers are switched to full precision."""
        if self.target is None:
            block = self.teacher.segment(self.index).block
            set_quantized(block, False)
            self.target = self._map(block, self.full)
        return self.target

    @torch.no_grad()
    def measure(self, keep: bool = True) -> float:
        """Run the present block, which must be finished, behind the quantized prefix; return its outputs' error.

        Args:
            keep: its outputs, for :meth:`advance`.

        Returns:
            ``||q - f||² / ||f||²`` over all samples, q its outputs and f its target.
        """
        assert self.prefix is not None
        target, block = self.compute_target(), self.chain.segment(self.index).block
        set_quantized(block, True)
        error = OutputError(self.storage.device)

        def add(rows: slice, output: Tensor) -> None:
            expected = target[rows].to(self.storage.device, non_blocking=True)
            assert isinstance(expected, Tensor)
            error.add(output, expected)

        if keep:
            self.outputs = self._map(block, self.prefix, frozen=False, see=add)
        else:
            for rows, output in self._run(block, self.prefix, frozen=False):
                add(rows, output)
        return error.relative

    def advance(self) -> None:
        """Go to the next block. The present one must be finished: it is left in its quantized form."""
        target = self.compute_target()
        block = self.chain.segment(self.index).block
        outputs, self.outputs = self.outputs, None
        if self.prefix is not None:
            set_quantized(block, True)
            if outputs is None:
                outputs = self._map(block, self.prefix, frozen=False)
        # What the present one keeps is in the list for the next one. Without a prefix nobody asks for the quantized model's.
        self.beside = self._keeping(self.teacher, target, self.beside)
        self.beside_prefix = self.beside if outputs is None else self._keeping(self.chain, outputs, self.beside_prefix)
        self.index += 1
        self.full = self._enter(self.teacher, target, self.beside)
        self.prefix = None if outputs is None else self._enter(self.chain, outputs, self.beside_prefix)
        self.target = None

    @torch.no_grad()
    def _side(self, images: Samples) -> Samples | None:
        parts = [self.teacher.side_of(part.to(self.storage.device)) for part in batches(images, self.batch_size)]
        known = [part for part in parts if part is not None]
        return joined(known, images) if known else None

    def _enter(self, chain: BlockChain, source: Samples, beside: Beside) -> Samples:
        """Inputs of the present block of ``chain`` from the outputs of the one before."""
        segment = chain.segment(self.index)
        if not (segment.takes_side or segment.takes_kept):
            return self._map(segment.before, source)
        return self._map(lambda x, part: segment.enter(x, *beside.rows(part, self.storage.device).tensors), source)

    def _keeping(self, chain: BlockChain, outputs: Samples, beside: Beside) -> Beside:
        """What travels beside the next block's input: what did so far, and what the present segment keeps of its outputs."""
        keep = chain.segment(self.index).keep
        return beside if keep is None else Beside(beside.side, (*beside.kept, self._map(keep, outputs)))

    @torch.no_grad()
    def _run(
        self, function: nn.Module | Callable[[Tensor, slice], Tensor], source: Samples, frozen: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """``function`` of all samples batch by batch: a module, or what also takes which samples they are."""
        device = self.storage.device
        for rows in slices(source, self.batch_size):
            part = source[rows].to(device, non_blocking=True)
            assert isinstance(part, Tensor)
            with arithmetic(self.frozen_dtype if frozen else "float32", device):
                out: Tensor = (function(part) if isinstance(function, nn.Module) else function(part, rows)).float()
            yield rows, out

    def _map(
        self,
        function: nn.Module | Callable[[Tensor, slice], Tensor],
        source: Samples,
        frozen: bool = True,
        see: Callable[[slice, Tensor], None] = lambda rows, out: None,
    ) -> Samples:
        """``function`` of all samples, see :meth:`_run`, where the tape lies; ``see`` is called with each batch."""
        if isinstance(function, nn.Identity) and source.device == self._home():
            return source
        result, apart = None, []
        for rows, out in self._run(function, source, frozen):
            see(rows, out)
            if isinstance(source, Ragged):
                apart.append(self.storage.empty(tuple(out.shape), out.dtype).copy_(out, non_blocking=True))
                continue
            if result is None:
                result = self.storage.empty((len(source), *out.shape[1:]), out.dtype)
            result[rows].copy_(out, non_blocking=True)
        if self.storage.device.type == "cuda" and self.storage.placement != "device":
            torch.cuda.synchronize(self.storage.device)
        if isinstance(source, Ragged):
            return Ragged(apart)
        assert result is not None
        return result

    def _home(self) -> torch.device:
        return self.storage.device if self.storage.placement == "device" else torch.device("cpu")
