"""Which records are compared: those of two runs, paired by what they must share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fimaq_core.errors import FimaqError
from tasks.common.record import ResultRecord, bits_name, read_record

#: What tells the records of a pair apart where a side has several of them.
_CHOICES = ("method", "variant")
#: What all pairs share, see :func:`shared`.
_NAMES = ("task", "data", "model", "bits", "scope")

_Key = tuple[tuple[str, str], ...]


class CompareError(FimaqError):
    """Two runs, or outcomes of theirs, that cannot be compared."""


@dataclass(frozen=True)
class Run:
    """A record and its file."""

    record: ResultRecord
    path: Path

    @property
    def scope(self) -> str:
        """What of the model is quantized; empty where the task has no scopes, and for full precision."""
        return str((self.record.recipe or {}).get("scope") or "")

    @property
    def method(self) -> str:
        """Of the record."""
        return self.record.method

    @property
    def variant(self) -> str:
        """Of the record, without the scope that its name ends with."""
        return self.record.variant.removesuffix(f" [{self.scope}]")

    @property
    def label(self) -> str:
        """Name for people."""
        record, mark = self.record, f" [{self.scope}]" if self.scope else ""
        if record.method == "fp":
            return f"{record.task} {record.model} fp"
        bits = bits_name(record.w_bit, record.a_bit)
        return f"{record.task} {record.model}{mark} {record.method} ({self.variant}) {bits} seed {record.seed}"


_Groups = dict[_Key, dict[int | None, Run]]


@dataclass(frozen=True)
class Side:
    """What was given as one side: its path, its records, and what is said of those that cannot be read."""

    path: Path
    runs: tuple[Run, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Records of the same measurement of two methods, by seed; the seeds are those of both.

    Attributes:
        key: what they share, by name (:func:`shared`).
    """

    key: Mapping[str, str]
    a: Mapping[int | None, Run]
    b: Mapping[int | None, Run]

    @property
    def label(self) -> str:
        """Name for people: model, scope and bits, and what tells it from other pairs of the two sides."""
        mark = f" [{self.key['scope']}]" if self.key["scope"] else ""
        return " ".join(
            [f"{self.key['model']}{mark}", *(self.key[name] for name in _CHOICES if name in self.key), self.key["bits"]]
        )


@dataclass(frozen=True)
class Pairing:
    """Pairs of records of two sides, and what has no partner."""

    first: Side
    second: Side
    pairs: tuple[Pair, ...]
    alone_a: tuple[Run, ...]
    alone_b: tuple[Run, ...]


def read_side(path: Path) -> Side:
    """Read the record at ``path`` (a ``result.json`` or the folder that holds one) or all records below it.

    Raises:
        CompareError: there is none.
        CheckpointError: the one record cannot be read. Of several those are left out and told.
    """
    single = path / "result.json" if (path / "result.json").is_file() else path
    if single.is_file():
        return Side(path, (Run(read_record(single), single),))
    if not path.is_dir():
        raise CompareError(f"There is no {path}: give a cell's folder, its result.json, or a folder that holds some.")
    runs, problems = [], []
    for file in sorted(path.rglob("result.json")):
        try:
            runs.append(Run(read_record(file), file))
        except FimaqError as error:
            problems.append(str(error))
    if not runs:
        raise CompareError(" ".join([f"There is no record below {path} that can be read.", *problems]))
    return Side(path, tuple(runs), tuple(problems))


def shared(run: Run) -> dict[str, str]:
    """What records must share to be compared, beside their seed; with full precision the first three."""
    record, data = run.record, run.record.dataset
    return {
        "task": record.task,
        "data": f"{data.name} {data.split} ({data.fingerprint[:12]})",
        "model": record.model,
        "bits": "full precision" if record.method == "fp" else bits_name(record.w_bit, record.a_bit),
        "scope": run.scope,
    }


def pair_up(first: Side, second: Side) -> Pairing:
    """Pair the records of two sides.

    Raises:
        CompareError: nothing has a partner, or something has several.
    """
    a, b = first.runs, second.runs
    full_a, full_b = (all(run.record.method == "fp" for run in runs) for runs in (a, b))
    if full_a and not full_b:
        b = _without(b, a)
    if full_b and not full_a:
        a = _without(a, b)
    choices = [name for name in _CHOICES if _several(a, name) or _several(b, name)]
    groups_a, groups_b = _grouped(a, choices, first), _grouped(b, choices, second)
    if full_a and not full_b:
        groups_a = _spread(first, groups_b)
    if full_b and not full_a:
        groups_b = _spread(second, groups_a)
    pairs = []
    for key, mine in groups_a.items():
        other = groups_b.get(key, {})
        if seeds := [seed for seed in mine if seed in other]:
            pairs.append(Pair(dict(key), {seed: mine[seed] for seed in seeds}, {seed: other[seed] for seed in seeds}))
    if not pairs:
        names = _NAMES[:3] if full_a != full_b else (*_NAMES, *choices, "seed")  # full precision has no more to share
        raise CompareError(_nothing_common(a, b, names))
    for pair in pairs:
        for seed, run in pair.a.items():
            if run.path.resolve() == pair.b[seed].path.resolve():
                raise CompareError(f"{run.path} is on both sides: give two runs, such as the folders of two methods.")
    used = {run.path for pair in pairs for side in (pair.a, pair.b) for run in side.values()}
    alone_a, alone_b = (tuple(run for run in runs if run.path not in used) for runs in (a, b))
    return Pairing(first, second, tuple(pairs), alone_a, alone_b)


def _several(runs: Sequence[Run], name: str) -> bool:
    return len({getattr(run, name) for run in runs if run.method != "fp"}) > 1


def _without(runs: Sequence[Run], others: Sequence[Run]) -> tuple[Run, ...]:
    """Leave out what the other side holds too: a model's folder holds its full precision, which is no partner of itself."""
    theirs = {run.path.resolve() for run in others}
    return tuple(run for run in runs if run.path.resolve() not in theirs)


def _grouped(runs: Sequence[Run], choices: Sequence[str], side: Side) -> _Groups:
    groups: _Groups = {}
    for run in runs:
        key = (*shared(run).items(), *((name, getattr(run, name)) for name in choices))
        other = groups.setdefault(key, {}).setdefault(run.record.seed, run)
        if other is not run:
            raise _ambiguous(side, other, run)
    return groups


def _spread(full: Side, others: _Groups) -> _Groups:
    """Full-precision runs under every key and seed of the other side that has their task, data and model."""
    by_model: dict[_Key, Run] = {}
    for run in full.runs:
        other = by_model.setdefault(tuple(shared(run).items())[:3], run)
        if other is not run:
            raise _ambiguous(full, other, run)
    return {key: dict.fromkeys(group, by_model[key[:3]]) for key, group in others.items() if key[:3] in by_model}


def _ambiguous(side: Side, one: Run, other: Run) -> CompareError:
    return CompareError(
        f"{side.path} holds several records of {one.label}, such as {one.path.parent} and {other.path.parent}: "
        "give the folder of one of them."
    )


def _nothing_common(a: Sequence[Run], b: Sequence[Run], names: Sequence[str]) -> str:
    def values(runs: Sequence[Run], name: str) -> list[str]:
        found = {
            shared(run)[name] if name in _NAMES else str(run.record.seed if name == "seed" else getattr(run, name))
            for run in runs
        }
        return sorted(value or "none" for value in found)

    apart = []
    for name in names:
        mine, other = values(a, name), values(b, name)
        if not set(mine) & set(other):
            apart.append(f"{name} ({_listed(mine)}; {_listed(other)})")
    why = f"these differ in {', '.join(apart)}" if apart else "no record of one side agrees with one of the other in all of them"
    return f"Nothing to compare: records are paired that share {', '.join(names)}, and {why}."


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
