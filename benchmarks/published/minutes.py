"""Published minutes of a whole quantization on one GPU, by model and method (``cost.csv``)."""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.names import PUBLISHED, StudyName, load_names

#: Kinds of evidence, the best first; see the README beside ``cost.csv``.
_EVIDENCE = ("primary", "cited", "user-reported", "secondary", "aggregator")


@dataclass(frozen=True)
class Minutes:
    """One published run time.

    Attributes:
        method: the method's id here.
        bits: bits of weights and activations; None where the source does not state them.
        images: calibration images, where the study is one of their number.
        place: the device and the source, for people.
        evidence, study: ranks of the evidence and of the study; the smallest is taken first.
    """

    method: str
    minutes: float
    bits: tuple[int, int] | None
    images: int | None
    place: str
    evidence: int
    study: int

    def distance(self, w_bits: int, a_bits: int) -> int:
        """Return how far the bits are from others; unstated bits are the farthest."""
        return 99 if self.bits is None else abs(self.bits[0] - w_bits) + abs(self.bits[1] - a_bits)


@cache
def published_minutes(path: Path = PUBLISHED / "cost.csv") -> Mapping[str, Sequence[Minutes]]:
    """Return the run times of a file by the model's id and by its ``model.tag``, in file order."""
    names = load_names()
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "minutes"]
    studies = list(dict.fromkeys(row["study"] for row in rows))
    found: dict[str, list[Minutes]] = defaultdict(list)
    for row in rows:
        model, method = names.models.get(row["model"]), names.methods.get(row["method"])
        if model is None or method is None:
            continue
        study = names.studies.get(row["study"], StudyName())
        source = re.sub(r" paper full text \([^)]*\)", "", row["source"])
        time = Minutes(
            method=method.comparable.get(row["variant"], method.id),
            minutes=float(row["value"]),
            bits=(int(row["w_bit"]), int(row["a_bit"])) if row["w_bit"] and row["a_bit"] else None,
            images=study.images,
            place=f"an {study.device} ({source})",
            evidence=_EVIDENCE.index(row["evidence"]),
            study=-studies.index(row["study"]),  # the newest is listed last
        )
        for name in (model.id, model.tag):
            found[name].append(time)
    return found
