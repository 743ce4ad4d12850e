"""Python and the packages that are wanted, installed, other or missing."""

import platform
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.doctor.findings import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCK, PROJECT = ROOT / "requirements" / "lock.txt", ROOT / "pyproject.toml"
SETUP = "make setup"


@dataclass(frozen=True)
class Package:
    """A wanted package.

    Attributes:
        wanted: versions, as the requirements say it.
        installed: version; None where there is none.
        state: ``broken``: installed in part only.
        needed: whether the project itself names it, and with which versions (empty: any); None where it only serves others.
    """

    name: str
    wanted: str
    installed: str | None
    state: Literal["ok", "other", "missing", "broken"]
    needed: str | None


def python_findings(project: Path = PROJECT) -> Iterator[Finding]:
    """Examine the interpreter against the project's ``requires-python``."""
    from packaging.specifiers import SpecifierSet

    wanted = _project(project).get("requires-python", "")
    version, data = platform.python_version(), {"version": platform.python_version(), "executable": sys.executable}
    text = f"Python {version} ({sys.executable})"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("python", "ok", text, data=data)
    else:
        fix = f"make clean setup PYTHON=/path/to/python, with one that is {wanted}"
        yield Finding("python", "problem", f"{text}: {wanted} is wanted", fix, data)


def package_findings(lock: Path = LOCK, project: Path = PROJECT) -> Iterator[Finding]:
    """Compare what is installed with a file of requirements; without it, with what the project names.

    A package that the project names is a problem where it is missing, broken or outside the project's versions; anything else
    that is not as locked is a note: it may serve development only.
    """
    where = lock.name if lock.is_file() else project.name
    packages, unclear = read_packages(lock, project)
    data = {"source": where, "packages": [vars(package) for package in packages]}
    good = sum(package.state == "ok" for package in packages)
    yield Finding("packages", "ok", f"{good} of {len(packages)} packages are as {where} has them", data=data)
    for line in unclear:
        yield Finding("packages", "problem", f"{where} has a line that is no requirement: {line}", "restore the file")
    notes: dict[str, list[str]] = {}
    for package in packages:
        if package.state == "ok":
            continue
        if package.needed is not None and not (package.state == "other" and _allowed(package)):
            has = f"is {package.installed}" if package.state == "other" else f"is {package.state}"
            yield Finding(
                f"package {package.name}", "problem", f"{package.name} {has}; wanted: {package.wanted or 'any version'}", SETUP
            )
        else:
            has = f"{package.name} {package.installed} (wanted {package.wanted})" if package.installed else package.name
            notes.setdefault(package.state, []).append(has)
    for state, names in notes.items():
        yield Finding("packages", "note", f"{state}: {', '.join(names)}", SETUP)


def _allowed(package: Package) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(package.needed or "").contains(package.installed or "", prereleases=True)


def read_packages(lock: Path, project: Path) -> tuple[list[Package], list[str]]:
    """Return the wanted packages that have to do with this platform, and lines that cannot be understood."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    needed = {canonicalize_name(one.name): one for one in map(Requirement, _project(project).get("dependencies", []))}
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else [str(one) for one in needed.values()]
    packages, unclear = [], []
    for line in (line.partition(" #")[0].strip() for line in lines):
        if not line or line.startswith(("#", "-")):
            continue
        try:
            one = Requirement(line)
        except InvalidRequirement:
            unclear.append(line)
            continue
        if one.marker is None or one.marker.evaluate():
            packages.append(_examined(one, needed.get(canonicalize_name(one.name))))
    return packages, unclear


def _examined(one: "Requirement", needed: "Requirement | None") -> Package:
    limits = None if needed is None else str(needed.specifier)
    wanted = str(one.specifier)
    try:
        distribution = metadata.distribution(one.name)
        installed = str(distribution.version or "")
        modules = [file for file in distribution.files or () if file.name == "__init__.py"]
        whole = bool(installed) and (not modules or distribution.locate_file(modules[0]).exists())  # type: ignore[attr-defined]
    except metadata.PackageNotFoundError:
        return Package(one.name, wanted, None, "missing", limits)
    except Exception:  # noqa: BLE001 unreadable metadata are what is examined
        return Package(one.name, wanted, None, "broken", limits)
    if not whole:
        return Package(one.name, wanted, installed or None, "broken", limits)
    same = one.specifier.contains(installed, prereleases=True)
    return Package(one.name, wanted, installed, "ok" if same else "other", limits)


def _project(path: Path) -> dict[str, Any]:
    """The project's table; of an installed package, which has no such file, its metadata."""
    if path.is_file():
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return content
    about = metadata.metadata("fimaq")
    return {
        "requires-python": about["Requires-Python"] or "",
        "dependencies": [line for line in about.get_all("Requires-Dist") or () if "extra ==" not in line],
    }
