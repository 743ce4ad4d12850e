"""Stages of a quantization: each is run once, or loaded from the file of an earlier run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, Pieces, save_checkpoint
from fimaq_core.files import is_there
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.recipe import Fields, Recipe
from fimaq_core.reconstruction.finish import Finishing
from fimaq_core.reconstruction.log import ReconstructionLog
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples


@dataclass
class Part:
    """One chain of a model, with everything that is needed to quantize the chain.

    Most models have one part.
    """

    chain: BlockChain  # on the computing device; stages change it in place
    inputs: Samples  # (n, ...) calibration inputs of the chain
    recipe: Recipe
    divergence: Divergence  # for Fisher passes
    fingerprint: Fingerprint | None = None  # identity of checkpoints; needed where files are kept
    name: str = ""  # name of the part; empty where the model is one chain
    facts: dict[str, Any] = field(default_factory=dict)  # JSON values for checkpoints' headers
    teacher: BlockChain | None = None  # copy of the chain with GELU, if its MLPs have ReLU now
    log: ReconstructionLog = field(default_factory=ReconstructionLog)
    finishing: Finishing | None = None  # result of joint finishing; None without it
    #: sha256 (hex) of the content of each file that stages wrote or loaded, by name of the file
    artefacts: dict[str, str] = field(default_factory=dict)


class Stage:
    """One step of a quantization, which changes a part in place.

    A subclass defines :meth:`make`, and :meth:`load` and the attributes if the stage has a file.
    """

    name: str = ""  # name for people and records
    kind: str = ""  # kind of its shared files; empty for a stage without a file
    mark: str = ""  # value of ``stage`` in the header of its file
    fields: Fields = "all"  # recipe fields that its file depends on
    piece: str = ""  # kind of its :class:`Pieces`; empty if the stage keeps no pieces

    def wanted(self, part: Part) -> bool:
        """Return True if the recipe asks for the stage and it has not run yet."""
        return True

    def title(self, part: Part) -> str:
        """Return the name of the stage for this part."""
        return f"{self.name} {part.name}".rstrip()

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        """Compute the stage; finished `pieces` are loaded instead."""
        raise NotImplementedError

    def load(self, part: Part, path: Path) -> str:
        """Load the result of :meth:`make`; return the file's sha256. Raises CheckpointError."""
        raise NotImplementedError

    def kept(self, part: Part) -> nn.Module:
        """Return the module whose state the file holds."""
        return part.chain

    def facts(self, part: Part) -> dict[str, Any]:
        """Return the JSON values that the file's header holds beside the fingerprint."""
        return {**part.facts, "stage": self.mark}


class Address(NamedTuple):
    """Places of a stage's results for one part: file, and folder of pieces; None keeps nothing."""

    file: Path | None = None
    pieces: Path | None = None

    @staticmethod
    def beside(file: Path, stage: Stage) -> "Address":
        """Return the address of ``file`` with the pieces' folder beside it."""
        return Address(file, file.with_name(f"{file.stem}.{stage.piece}s") if stage.piece else None)


@dataclass(frozen=True)
class CheckpointStore:
    """Runs stages, or loads the files of earlier runs.

    Example::

        store = CheckpointStore(address=lambda stage, part: Address(folder / stage.kind))
        reused = store.run(CALIBRATE, part)
    """

    resources: Resources = field(default_factory=Resources)
    address: Callable[[Stage, Part], Address] = lambda stage, part: Address()
    #: context in which no other process makes the same file
    alone: Callable[[Path | None], AbstractContextManager[object]] = nullcontext

    def run(self, stage: Stage, part: Part) -> bool:
        """Run `stage` on `part` and keep the result; return True if the result was loaded instead.

        Pieces are removed once the file exists. If the stage has no file, the pieces stay.

        Raises:
            CheckpointError: the file belongs to another run, is damaged or cannot be written.
        """
        path, folder = self.address(stage, part)
        pieces = Pieces(folder, stage.piece, part.fingerprint, stage.fields)
        if path is None:
            stage.make(part, self.resources, pieces)
            return False
        with self.alone(path):
            reused = is_there(path)
            if reused:
                sha256 = stage.load(part, path)
            else:
                assert part.fingerprint is not None
                stage.make(part, self.resources, pieces)
                state, facts = stage.kept(part).state_dict(), stage.facts(part)
                sha256 = save_checkpoint(path, state, part.fingerprint, facts)
            part.artefacts[path.name] = sha256
            pieces.remove()  # also pieces of a run that was stopped just before
        return reused
