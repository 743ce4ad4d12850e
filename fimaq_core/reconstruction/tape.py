"""The tape: inputs and outputs of the current block over all samples, each computed once.

Block i's output is block i + 1's input, so the walk costs two forward passes per block (full
precision and quantized), whatever the depth. Memory, on the device, in host memory or in files: at
most five tensors of samples x block output (input and output in full precision, the input behind
the quantized prefix, and the next two while advancing), and twice the tensors that segments keep.
GLF-Q's loss also keeps the model's penultimate features there.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fimaq_core.chain import Beside, BlockChain
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import set_quantized
from fimaq_core.numerics import Arithmetic, arithmetic
from fimaq_core.recipe import Recipe
from fimaq_core.resources import Placement, Resources
from fimaq_core.samples import Samples

#: A module, or a function of a batch and its rows.
BatchFunction = nn.Module | Callable[[Tensor, slice], Tensor]


class Storage:
    """Maker of the tape's tensors: on the ``device`` (fastest), in ``host`` memory or on ``disk``.

    Tensors on disk are memory-mapped temporary files. ``pinned`` host memory suits few large
    tensors; many small ones would waste it, since each is rounded up to a power of two.
    """

    def __init__(self, placement: Placement, device: torch.device, pinned: bool = True) -> None:
        self.placement, self.device = placement, device
        self.pinned = pinned and device.type == "cuda"
        on_disk = placement == "disk"
        self._folder = tempfile.TemporaryDirectory(prefix="fimaq-tape-") if on_disk else None
        self._count = 0

    @property
    def home(self) -> torch.device:
        """The device of the tensors made here."""
        return self.device if self.placement == "device" else torch.device("cpu")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make an uninitialised tensor."""
        if self.placement == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self._folder is None:
            return torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.bin"
        size = int(torch.Size(shape).numel())
        # Space is reserved now, since later a full disk would end the process by a signal.
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size * dtype.itemsize, 1))
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        path.unlink()  # the data live as long as the tensor
        return mapped.view(shape)


class Collected:
    """Batches of a sweep, joined in a storage to as many samples as ``like``, of the same kind."""

    def __init__(self, storage: Storage, like: Samples) -> None:
        self._storage, self._like = storage, like
        self._tensors: list[Tensor] = []

    def put(self, rows: slice, values: Tensor) -> None:
        """Keep ``values`` (B, ...) of the samples ``rows``; calls come in the order of samples."""
        shape = values.shape[0] if self._like.varying else len(self._like), *values.shape[1:]
        if self._like.varying or not self._tensors:
            self._tensors.append(self._storage.empty(shape, values.dtype))
        place = self._tensors[-1] if self._like.varying else self._tensors[0][rows]
        place.copy_(values, non_blocking=True)

    @property
    def samples(self) -> Samples:
        """All samples, ready to be read."""
        if self._storage.device.type == "cuda" and self._storage.placement != "device":
            torch.cuda.synchronize(self._storage.device)
        return Samples(self._tensors if self._like.varying else self._tensors[0])


def squared_sum(values: Tensor) -> Tensor:
    """Return Σ values², a float64 scalar."""
    # In pieces, since a whole batch of maps in float64 would need much memory.
    parts = torch.split(values.flatten(), 2**22)
    return torch.stack([part.double().square_().sum() for part in parts]).sum()


def over(error: float, size: float) -> float:
    """Return ``error / size``: 0 if the error is 0, infinite if only the size is 0."""
    return 0.0 if error == 0 else (error / size if size else float("inf"))


def mean_of(samples: Samples, batch_size: int, squared: bool = False) -> float:
    """Return the mean of all values of ``samples`` (n, N), or of their squares."""
    total, count = 0.0, 0
    for part in samples.batches(batch_size):
        total += float(squared_sum(part) if squared else part.sum(1).double().sum())
        count += part.numel()
    return total / count


class Tape:
    """Position of a walk over a chain that is quantized block by block.

    Example::

        tape = Tape(chain, images, Storage("device", device), with_prefix=True)
        tape.compute_target()  # then optimise block 0
        tape.advance()

    Args:
        images: (n, ...) inputs of ``chain``; if their shapes vary, all samples here do.
        with_prefix: True to run the quantized prefix (all blocks before the current one) too.
        batch_size: samples per forward pass.
        frozen_dtype: arithmetic of full-precision parts.
        teacher: the full-precision model, with the same segments; by default ``chain`` itself.

    Attributes:
        index: number of the current block.
        full: (n, ...) the block's inputs in the full-precision model.
        prefix: (n, ...) the block's inputs behind the quantized prefix; None without prefix.
        beside, beside_prefix: tensors that travel beside ``full`` and ``prefix``.
        target: (n, ...) the block's full-precision outputs; None until :meth:`compute_target`.
        outputs: (n, ...) quantized outputs behind the prefix; None until :meth:`measure`.
    """

    def __init__(
        self,
        chain: BlockChain,
        images: Samples | Tensor,
        storage: Storage,
        *,
        with_prefix: bool,
        batch_size: int = 32,
        frozen_dtype: Arithmetic = "float32",
        teacher: BlockChain | None = None,
    ) -> None:
        self.chain, self.teacher = chain, chain if teacher is None else teacher
        self.storage, self.batch_size, self.frozen_dtype = storage, batch_size, frozen_dtype
        self.index = 0
        samples, device, project = Samples.of(images), storage.device, self.teacher.side
        side = None
        if project is not None:
            side = samples.map(lambda part: project(part.to(device)), batch_size)
        self.beside = self.beside_prefix = Beside(side)
        self.full = self._enter(self.teacher, samples, self.beside)
        # Nothing is quantized before the first block.
        self.prefix: Samples | None = self.full if with_prefix else None
        self.target: Samples | None = None
        self.outputs: Samples | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all samples that are kept now; shared tensors count once."""
        parts = [self.full, self.prefix, self.target, self.outputs, self.beside.side]
        parts += [*self.beside.kept, *self.beside_prefix.kept]
        tensors = [tensor for part in parts if part is not None for tensor in part.tensors]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def features(self, images: Samples) -> Samples:
        """Return the teacher's penultimate features (n, ...) of ``images``, in the storage.

        They are computed in float32, as the rest behind a block is in the steps.
        """
        model = self.teacher
        return self._map(
            lambda x, _: model.tail(0, x, model.side_of(x), feature=True), images, "float32"
        )

    def compute_target(self) -> Samples:
        """Run the current block in full precision, once, and leave it in full precision."""
        if self.target is None:
            block = self.teacher.segment(self.index).block
            set_quantized(block, False)
            self.target = self._map(block, self.full)
        return self.target

    @torch.no_grad()
    def measure(self, keep: bool = True) -> float:
        """Run the current block, which must be finished, behind the quantized prefix.

        Returns ``||q - f||² / ||f||²`` over all samples, with the block's outputs q and target f.
        ``keep`` stores the outputs for :meth:`advance`.
        """
        assert self.prefix is not None
        target, block = self.compute_target(), self.chain.segment(self.index).block
        set_quantized(block, True)
        device, kept = self.storage.device, Collected(self.storage, self.prefix)
        error, size = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        for rows, output in self._run(block, self.prefix, "float32"):
            expected = target[rows].to(device, non_blocking=True)
            error += squared_sum(output - expected)
            size += squared_sum(expected)
            if keep:
                kept.put(rows, output)
        if keep:
            self.outputs = kept.samples
        return over(float(error), float(size))

    def advance(self) -> None:
        """Go to the next block. The current block must be finished and is left quantized."""
        target = self.compute_target()
        block = self.chain.segment(self.index).block
        outputs, self.outputs = self.outputs, None
        if self.prefix is not None:
            set_quantized(block, True)
            if outputs is None:
                outputs = self._map(block, self.prefix, "float32")
        self.beside = self._keeping(self.teacher, target, self.beside)
        if outputs is None:
            self.beside_prefix = self.beside
        else:
            self.beside_prefix = self._keeping(self.chain, outputs, self.beside_prefix)
        self.index += 1
        self.full = self._enter(self.teacher, target, self.beside)
        self.prefix = self.target = None
        if outputs is not None:
            self.prefix = self._enter(self.chain, outputs, self.beside_prefix)

    def _enter(self, chain: BlockChain, source: Samples, beside: Beside) -> Samples:
        """Return the inputs of the current block from ``source``, the outputs of the last block."""
        segment = chain.segment(self.index)
        if not (segment.takes_side or segment.takes_kept):
            return self._map(segment.before, source)
        device = self.storage.device
        return self._map(lambda x, rows: segment.enter(x, *beside.rows(rows, device)), source)

    def _keeping(self, chain: BlockChain, outputs: Samples, beside: Beside) -> Beside:
        """Return the tensors that travel beside the next block's input."""
        keep = chain.segment(self.index).keep
        if keep is None:
            return beside
        return Beside(beside.side, (*beside.kept, self._map(keep, outputs)))

    @torch.no_grad()
    def _run(
        self, function: BatchFunction, source: Samples, dtype: Arithmetic
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each batch and the result of ``function``."""
        device = self.storage.device
        for rows in source.slices(self.batch_size):
            part = source[rows].to(device, non_blocking=True)
            args = (part,) if isinstance(function, nn.Module) else (part, rows)
            with arithmetic(dtype, device):
                out: Tensor = function(*args).float()
            yield rows, out

    def _map(
        self, function: BatchFunction, source: Samples, dtype: Arithmetic | None = None
    ) -> Samples:
        """Return the results of ``function`` for all samples, in the storage."""
        if isinstance(function, nn.Identity) and source.device == self.storage.home:
            return source
        kept = Collected(self.storage, source)
        for rows, out in self._run(function, source, dtype or self.frozen_dtype):
            kept.put(rows, out)
        return kept.samples


def start_walk(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    divergence: Divergence,
    resources: Resources,
    *,
    with_prefix: bool,
    teacher: BlockChain | None = None,
) -> tuple[Tape, Samples]:
    """Return a tape at the first block, and the divergence's reference for the teacher's outputs.

    Teacher and chain must be in full precision. Other arguments are as in :class:`Tape`.
    """
    device, model = next(chain.parameters()).device, chain if teacher is None else teacher
    outputs = images.map(lambda part: model(part.to(device)).float(), resources.batch_size)
    storage = Storage(resources.placement, device, pinned=not images.varying)
    tape = Tape(
        chain,
        images,
        storage,
        with_prefix=with_prefix,
        batch_size=resources.batch_size,
        frozen_dtype=recipe.frozen_dtype,
        teacher=teacher,
    )
    return tape, divergence.reference(outputs)
