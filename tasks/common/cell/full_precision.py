"""The cell of the full-precision model, from which quantized cells take metrics and outputs."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fimaq_core.files import replaced_whole
from fimaq_core.progress import OnProgress
from tasks.common.arrays import read_arrays
from tasks.common.cell.lease import awaited
from tasks.common.cell.prepare import prepare
from tasks.common.fidelity import RawOutputs
from tasks.common.hashing import file_sha256
from tasks.common.record import Metric, ResultRecord
from tasks.common.request import CellRequest

#: File of the raw outputs in the folder of the cell.
FILE = "outputs.npz"
#: Bound on its arrays in bytes; those of 50,000 samples with 1,000 classes have 400 million.
_MOST_BYTES = 2**34


@dataclass(frozen=True)
class FullPrecision:
    """A finished cell of a full-precision model."""

    record: ResultRecord
    folder: Path  # of the record
    request: CellRequest

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics of the full-precision model."""
        return self.record.metrics

    def outputs(self, samples: Sequence[str], on_progress: OnProgress) -> RawOutputs:
        """Return the raw outputs for the ``samples``, in their order.

        Records of older versions have no file of them, and a file may be damaged or of other
        samples: then the model is measured again, and its outputs are kept for the next cell. The
        result is empty if the samples differ.
        """
        if (kept := self._kept(samples)) is not None:
            return kept
        with awaited(self.folder / FILE, on_progress):
            if (kept := self._kept(samples)) is not None:  # by another process
                return kept
            found = prepare(self.request, on_progress).evaluate({})
            if list(found.outcomes["sample"]) != list(samples):
                return {}
            write_raw(self.folder, found.outputs, samples, self._mark)
        return found.outputs

    @property
    def _mark(self) -> str:
        """Text that tells the record from others; those of schema 1 have no fingerprint."""
        return self.record.fingerprint or self.record.finished

    def _kept(self, samples: Sequence[str]) -> RawOutputs | None:
        """Return the outputs in the file; None if it is of another record or of other samples."""
        path = self.folder / FILE
        with contextlib.suppress(OSError, ValueError):
            arrays = read_arrays(path, _MOST_BYTES)
            same = arrays.pop("samples", None) == _digest(samples)
            own = str(arrays.pop("record", "")) == self._mark
            if same and (own or file_sha256(path) == self.record.artefacts.get(FILE)):
                return arrays
        return None


def write_raw(
    folder: Path, outputs: RawOutputs, samples: Sequence[str], record: str = ""
) -> Mapping[str, str]:
    """Write raw outputs into ``folder``; return the sha256 (hex) of the file by its name.

    ``record`` names the finished record that the outputs belong to; it is empty if the record is
    written later, with the sha256.
    """
    if not outputs:
        return {}
    facts = {"samples": _digest(samples), **({"record": record} if record else {})}
    with replaced_whole(folder / FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **facts, **outputs)
    return {FILE: file_sha256(folder / FILE)}


def _digest(samples: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(map(str, samples)).encode()).hexdigest()
