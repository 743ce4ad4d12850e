"""Pairs of records of two runs: records that share task, data, model, bits, scope and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.results.outcomes import CompareError
from benchmarks.results.scores import read_records, scope_of
from tasks.common.record import ResultRecord, bits_name, read_record

#: Fields that the records of a pair share; only the first three if one is full precision.
_SHARED = ("task", "data", "model", "bits", "scope")
#: Fields that records must also share if one side has several values of them.
_CHOICES = ("method", "variant")


@dataclass(frozen=True)
class RecordFile:
    """A record and its file."""

    record: ResultRecord
    path: Path

    @cached_property
    def fields(self) -> dict[str, str]:
        """Fields by which records are paired."""
        record, data, scope = self.record, self.record.dataset, scope_of(self.record)
        return {
            "task": record.task,
            "data": f"{data.name} {data.split} ({data.fingerprint[:12]})",
            "model": record.model,
            "bits": "full precision" if self.full else bits_name(record.w_bit, record.a_bit),
            "scope": scope,
            "method": record.method,
            "variant": record.variant.removesuffix(f" [{scope}]"),
            "seed": str(record.seed),
        }

    @property
    def full(self) -> bool:
        """True for a record in full precision."""
        return self.record.method == "fp"

    @property
    def label(self) -> str:
        """Name in messages."""
        of = self.fields
        name = f"{of['task']} {_subject(of)} {of['method']}"
        return name if self.full else f"{name} ({of['variant']}) {of['bits']} seed {of['seed']}"


def _subject(fields: Mapping[str, str]) -> str:
    return fields["model"] + (f" [{fields['scope']}]" if fields["scope"] else "")


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    path: Path
    files: Sequence[RecordFile]
    problems: Sequence[str] = ()  #: one message for each unreadable record

    @property
    def full(self) -> bool:
        """True if all records are in full precision."""
        return all(file.full for file in self.files)

    def by(self, names: Sequence[str]) -> dict[tuple[str, ...], RecordFile]:
        """Return the records by the values of fields. Raises CompareError for equal records."""
        found: dict[tuple[str, ...], RecordFile] = {}
        for file in self.files:
            other = found.setdefault(tuple(file.fields[name] for name in names), file)
            if other is not file:
                raise CompareError(
                    f"{self.path} contains several records of {other.label}, such as "
                    f"{other.path.parent} and {file.path.parent}: give the folder of one of them."
                )
        return found


@dataclass(frozen=True)
class Pair:
    """Records of two methods that differ in nothing else, by seed."""

    key: Mapping[str, str]  #: the shared fields
    a: dict[int | None, RecordFile]
    b: dict[int | None, RecordFile]

    @property
    def records(self) -> list[ResultRecord]:
        """The records of both sides."""
        return [file.record for side in (self.a, self.b) for file in side.values()]

    @property
    def label(self) -> str:
        """Name in tables: model, scope, choices (method, variant) and bits."""
        own = [self.key[name] for name in _CHOICES if name in self.key]
        return " ".join([_subject(self.key), *own, self.key["bits"]])


def read_side(path: Path) -> Side:
    """Read the record at ``path`` (``result.json`` or its folder), or all records below ``path``.

    Raises CompareError if there is none, and CheckpointError if a single record cannot be read.
    Among several records, the unreadable ones become ``problems``.
    """
    single = path / "result.json" if (path / "result.json").is_file() else path
    if single.is_file():
        return Side(path, [RecordFile(read_record(single), single)])
    if not path.is_dir():
        give = "give a cell's folder, its result.json, or a folder that contains cells"
        raise CompareError(f"There is no {path}: {give}.")
    records, problems = read_records(path)
    if not records:
        nothing = f"There is no record below {path} that can be read."
        raise CompareError(" ".join([nothing, *problems]))
    return Side(path, [RecordFile(record, file) for file, record in records], problems)


def pair_up(a: Side, b: Side) -> list[Pair]:
    """Pair the records of two sides.

    A side that is all full precision is paired with all records of the same model on the other
    side. Raises CompareError if no record has a partner, or if one has several.
    """
    if a.full and not b.full:
        return [Pair(pair.key, pair.b, pair.a) for pair in pair_up(b, a)]
    beside_full = b.full and not a.full
    if beside_full:  # the folder of a model also contains its full-precision record
        paths = {file.path.resolve() for file in b.files}
        a = replace(a, files=[file for file in a.files if file.path.resolve() not in paths])
    choices = [
        name
        for name in _CHOICES
        if any(len({f.fields[name] for f in s.files if not f.full}) > 1 for s in (a, b))
    ]
    fields = (*_SHARED, *choices, "seed")
    names = _SHARED[:3] if beside_full else fields
    partners = b.by(names)
    pairs: dict[tuple[str, ...], Pair] = {}
    for key, file in a.by(fields).items():
        partner = partners.get(key[: len(names)])
        if partner is None:
            continue
        if file.path.resolve() == partner.path.resolve():
            give = "give two runs, such as the folders of two methods"
            raise CompareError(f"{file.path} is on both sides: {give}.")
        shared = dict(zip(fields[:-1], key[:-1], strict=True))
        pair = pairs.setdefault(key[:-1], Pair(shared, {}, {}))
        pair.a[file.record.seed], pair.b[file.record.seed] = file, partner
    if not pairs:
        rule = f"the records of a pair share {', '.join(names)}"
        raise CompareError(f"Nothing to compare: {rule}, and {_difference(a, b, names)}.")
    return list(pairs.values())


def alone(side: Side, pairs: Sequence[Pair]) -> list[RecordFile]:
    """Return the records of a side that have no partner."""
    files = (file for pair in pairs for own in (pair.a, pair.b) for file in own.values())
    used = {file.path.resolve() for file in files}
    return [file for file in side.files if file.path.resolve() not in used]


def _difference(a: Side, b: Side, names: Sequence[str]) -> str:
    """Return the fields in which all records of one side differ from those of the other."""
    apart = []
    for name in names:
        values = [sorted({file.fields[name] or "none" for file in side.files}) for side in (a, b)]
        if not set(values[0]) & set(values[1]):
            more = [f" and {len(found) - 4} more" if len(found) > 4 else "" for found in values]
            texts = [", ".join(found[:4]) + rest for found, rest in zip(values, more, strict=True)]
            apart.append(f"{name} ({'; '.join(texts)})")
    if apart:
        return f"the two sides differ in {', '.join(apart)}"
    return "no two records agree in all of these"
