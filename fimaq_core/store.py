"""Stages of a quantization: each is made once, or loaded from the file that an earlier run kept."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, Scope, load_checkpoint, save_checkpoint
from fimaq_core.files import remove
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import OnProgress, silent
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import EngineChoice
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from fimaq_core.reconstruction.tape import Placement
from fimaq_core.samples import Samples


@dataclass(frozen=True)
class Resources:
    """How to run, as far as it does not belong to the recipe.

    Attributes:
        on_progress: receives progress.
        placement: where the tape lives.
        batch_size: images per forward pass of calibration, tape and Fisher passes.
        engine: how optimisation steps run, see :mod:`fimaq_core.reconstruction.engines`.
    """

    on_progress: OnProgress = silent
    placement: Placement = "device"
    batch_size: int = 32
    engine: EngineChoice = "auto"


@dataclass
class Part:
    """One chain of a model, and all that it is quantized with. Most models have one part.

    Attributes:
        chain: on the device to use; stages change it in place.
        inputs: (n, ...) calibration inputs of the chain.
        recipe: all settings.
        divergence: behind the Fisher passes.
        fingerprint: what checkpoints belong to; needed where files are kept.
        name: of the part; empty where the model is one chain.
        facts: JSON values for the header of checkpoints.
        teacher: the chain as it was before its MLPs were reconstructed; else None.
        log: what the reconstruction did.
    """

    chain: BlockChain
    inputs: Samples
    recipe: Recipe
    divergence: Divergence
    fingerprint: Fingerprint | None = None
    name: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    teacher: BlockChain | None = None
    log: ReconstructionLog = field(default_factory=ReconstructionLog)


@dataclass(frozen=True)
class Pieces:
    """Finished pieces of a stage under way, such as blocks: ``<folder>/<kind>-NNN.safetensors``.

    Attributes:
        folder: None keeps nothing.
        kind: ``block`` or ``mlp``.
        fingerprint: what the files belong to; needed with ``folder``.
        scope: which recipe fields that takes.
    """

    folder: Path | None = None
    kind: str = ""
    fingerprint: Fingerprint | None = None
    scope: Scope = "all"

    def load(self, index: int, module: nn.Module) -> tuple[dict[str, Any], Path] | None:
        """Load a finished piece into `module`; return its facts and its file, or None."""
        path = self._path(index)
        if path is None or not path.is_file():
            return None
        return load_checkpoint(path, module, self.fingerprint, self.scope), path

    def save(self, index: int, module: nn.Module, facts: dict[str, Any] | None = None) -> None:
        """Keep a finished piece with `facts`."""
        path = self._path(index)
        if path is not None:
            assert self.fingerprint is not None
            facts = {"stage": self.kind, "index": index, **(facts or {})}
            save_checkpoint(path, module.state_dict(), self.fingerprint, facts)

    def remove(self) -> None:
        """Remove all pieces, and their folder if it holds nothing else."""
        if self.folder is None:
            return
        for file in self.folder.glob(f"{self.kind}-*.safetensors"):
            remove(file)
        with contextlib.suppress(OSError):  # another process may have been faster
            self.folder.rmdir()

    def _path(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.kind}-{index:03d}.safetensors"


class Stage:
    """One step of a quantization, which changes a part in place.

    Subclasses define :meth:`make`, and where they have a file, the class attributes.

    Attributes:
        name: for people and records.
        kind: of its shared files; empty for a stage without a file.
        mark: what its file says of itself.
        scope: which recipe fields its file depends on.
        piece: kind of its :class:`Pieces`; empty for none.
    """

    name: str = ""
    kind: str = ""
    mark: str = ""
    scope: Scope = "all"
    piece: str = ""

    def wanted(self, part: Part) -> bool:
        """Return True if the recipe asks for the stage and it was not done yet."""
        return True

    def title(self, part: Part) -> str:
        """Return the name of the stage of this part, for people and records."""
        return f"{self.name} {part.name}".rstrip()

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        """Compute the stage, going on from finished `pieces`."""
        raise NotImplementedError

    def load(self, part: Part, path: Path) -> None:
        """Load what :meth:`make` would compute. Raises CheckpointError."""
        raise NotImplementedError

    def kept(self, part: Part) -> nn.Module:
        """Return the module whose state the file holds."""
        return part.chain

    def facts(self, part: Part) -> dict[str, Any]:
        """Return what the header of the file holds beside the fingerprint."""
        return {**part.facts, "stage": self.mark}


class Address(NamedTuple):
    """Where a stage of a part has its file, and the folder of its pieces; None keeps nothing."""

    file: Path | None = None
    pieces: Path | None = None

    @staticmethod
    def beside(file: Path, stage: Stage) -> "Address":
        """Return the address with pieces beside the file."""
        return Address(file, file.with_name(f"{file.stem}.{stage.piece}s") if stage.piece else None)


@dataclass(frozen=True)
class CheckpointStore:
    """Runs stages, or loads what earlier runs kept.

    Example::

        store = CheckpointStore(address=lambda stage, part: Address(folder / stage.kind))
        reused = store.run(CALIBRATE, part)

    Attributes:
        resources: how to run.
        address: where a stage of a part is kept.
        alone: keeps other processes from making the same file meanwhile.
    """

    resources: Resources = Resources()
    address: Callable[[Stage, Part], Address] = lambda stage, part: Address()
    alone: Callable[[Path | None], AbstractContextManager[object]] = nullcontext

    def run(self, stage: Stage, part: Part) -> bool:
        """Run `stage` on `part`, and keep the result; return True if it was loaded instead.

        Pieces go once the file is there. Without a file they stay.

        Raises:
            CheckpointError: a file that is there belongs to another run or is damaged, or cannot be
                written.
        """
        path, folder = self.address(stage, part)
        pieces = Pieces(folder, stage.piece, part.fingerprint, stage.scope)
        if path is None:
            stage.make(part, self.resources, pieces)
            return False
        with self.alone(path):
            reused = path.is_file()
            if reused:
                stage.load(part, path)
            else:
                assert part.fingerprint is not None
                stage.make(part, self.resources, pieces)
                save_checkpoint(
                    path, stage.kept(part).state_dict(), part.fingerprint, stage.facts(part)
                )
            pieces.remove()  # also those of a run that was stopped just before
        return reused
