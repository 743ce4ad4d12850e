"""``python -m benchmarks doctor``: checks of this machine, with a fix for each problem."""

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import size_text
from benchmarks.costs.sources import gather
from benchmarks.grid import options as given
from benchmarks.grid.cell import Adapter, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.preflight import missing
from benchmarks.grid.schema import load_grid
from fimaq_core.errors import FimaqError
from fimaq_core.progress import PrintableConsole
from tasks.common.cell.machine import container_limits, processor

SETUP = "make setup"
#: Free bytes below which a disk gets a note.
LITTLE = 5e9
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


class Finding(NamedTuple):
    """Finding of a check: a ``note`` may slow down a run, a ``problem`` prevents it."""

    state: Literal["ok", "note", "problem"]
    text: str
    fix: str = ""


def guarded(check: str, examine: Callable[..., Iterable[Finding]], *args: Any) -> list[Finding]:
    """Return the findings of ``examine(*args)``; an exception becomes the last finding."""
    found: list[Finding] = []
    try:
        found.extend(examine(*args))
    except FimaqError as error:
        found.append(Finding("problem", f"{check}: {error}"))
    except Exception as error:  # noqa: BLE001 anything may be broken on the machine
        text = f"{check} cannot be examined: {type(error).__name__}: {error}"
        found.append(Finding("problem", text))
    return found


def package_findings(requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """Report Python, and the requirements (None: of fimaq) that no installed package meets."""
    from packaging.requirements import Requirement

    yield Finding("ok", f"Python {platform.python_version()} ({sys.executable})")
    for one in map(Requirement, requirements or metadata.requires("fimaq") or ()):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                has = metadata.version(one.name)
            except metadata.PackageNotFoundError:
                has = None
            if not has or not one.specifier.contains(has, prereleases=True):
                text = f"{one.name} is {has or 'missing'}; wanted: {one.specifier or 'any'}"
                yield Finding("problem", text, SETUP)


def torch_findings(seconds: float = 180.0) -> Iterator[Finding]:
    """Report PyTorch and its GPUs; uses another process, because PyTorch may crash."""
    command = [sys.executable, "-m", "torch.utils.collect_env"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.SubprocessError as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        yield Finding("problem", f"PyTorch does not load: {lines[-1]}", SETUP)
        return
    facts = dict(re.findall(r"^([^:\n]+): (.*)$", done.stdout, re.MULTILINE))
    build = facts["CUDA used to build PyTorch"]
    driver = facts["Nvidia driver version"].replace("Could not collect", "none")
    text = f"PyTorch {facts['PyTorch version']}, built for CUDA {build}, NVIDIA driver {driver}"
    yield Finding("ok", text)
    if facts["Is CUDA available"] == "True":
        yield from (Finding("ok", gpu) for gpu in re.findall(r"GPU \d+: .+", done.stdout))
    elif driver != "none":
        fix = "update the driver, or look at CUDA_VISIBLE_DEVICES"
        yield Finding("note", f"the driver {driver} is there, but PyTorch sees no GPU", fix)


def machine_findings(limits: Mapping[str, float | None]) -> Iterator[Finding]:
    """Report processor and memory, and lower limits of a container (None: no limit)."""
    cores, memory = psutil.cpu_count() or 1, psutil.virtual_memory()
    text = f"{size_text(memory.total)} of memory, {size_text(memory.available)} available"
    yield Finding("ok", f"{processor()}, {cores} cores, {text}")
    share, count = limits["memory"] or memory.total, limits["cores"] or cores
    if share < memory.total or count < cores:
        text = f"this container may use {size_text(share)} of memory and {count:g} cores"
        yield Finding("note", text, "give --jobs: not every library sees a container's limits")


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def results_findings(results: Path) -> Iterator[Finding]:
    """Report if the results folder can be written, and the free space for results and caches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = _existing(results)
    try:
        with tempfile.TemporaryFile(dir=place):
            yield Finding("ok", f"the results folder {results} can be written")
    except OSError as error:
        text = f"the results folder {results} cannot be written: {error.strerror or error}"
        fix = f"make {place} a writable folder, or give another --results"
        yield Finding("problem", text, fix)
    temporary, hub = Path(tempfile.gettempdir()), Path(HF_HUB_CACHE)
    purposes = {"results": results, "temporary files": temporary, "weights from the hub": hub}
    for purpose, path in purposes.items():
        free = shutil.disk_usage(_existing(path)).free
        text = f"{size_text(free)} free for {purpose} ({path})"
        yield Finding("note", text, "free space there") if free < LITTLE else Finding("ok", text)


def profile_findings(
    name: str, options: RunOptions, adapter: Adapter, cuda: bool, memory: float
) -> Iterator[Finding]:
    """Report if a profile can run, what is missing, and the memory of its largest cell.

    ``cuda`` is True if PyTorch sees a GPU. ``memory`` is the memory of this machine in bytes.
    """
    grid = load_grid(name)
    cells = expand(grid, Filters(), options)
    sections = {label: [cell for cell in cells if cell.section == label] for label in grid.tasks}
    lacking = {label: missing(own, adapter) for label, own in sections.items()}
    blocked = [label for label in lacking if lacking[label]]
    if blocked:
        rest = ",".join(label for label in lacking if label not in blocked)
        text = f"{name}: cannot run: {', '.join(blocked)}"
        yield Finding("problem", text + (f"; can run: --tasks {rest}" if rest else ""))
    elif grid.device.startswith("cuda") and not cuda:
        text = f"{name}: cannot run: its device is {grid.device}, and PyTorch sees no GPU"
        yield Finding("problem", text)
    else:
        yield Finding("ok", f"{name}: can run ({len(cells)} cells)")
    for message in dict.fromkeys(message for found in lacking.values() for message in found):
        labels = ", ".join(label for label in lacking if message in lacking[label])
        yield Finding("problem", f"{labels}: {message}")
    if grid.device == "auto" and not cuda:
        yield Finding("note", "no GPU is visible, and this profile takes very long without one")
    costs, _ = gather(cells, adapter, [grid.name], options.results)
    known = [(cost, cell) for cell in cells if (cost := costs.of(cell)) and cost.memory]
    if known:
        cost, cell = max(known, key=lambda one: one[0].memory or 0)
        most = cost.memory or 0
        text = f"{cell.label} takes {size_text(most)} of memory ({cost.origin})"
        little = most > memory and not cuda
        text += f", and {size_text(memory)} may be used here" if little else ""
        yield Finding("note" if little else "ok", text)


def examine(profile: str, options: RunOptions, adapter: Adapter) -> dict[str, Any]:
    """Run all checks; return the object that ``--json`` prints."""
    torch, limits = guarded("PyTorch", torch_findings), container_limits()
    cuda = any(one.text.startswith("GPU ") for one in torch)
    memory = limits["memory"] or psutil.virtual_memory().total
    findings = {
        "Python and packages": guarded("packages", package_findings) + torch[:1],
        "Machine": torch[1:] + guarded("machine", machine_findings, limits),
        "Results": guarded("results", results_findings, options.results),
        "Profile": guarded(profile, profile_findings, profile, options, adapter, cuda, memory),
    }
    vital = [*findings["Python and packages"], *findings["Results"], *findings["Profile"]]
    return {
        "schema": 3,
        "profile": profile,
        "can_run": not any(one.state == "problem" for one in vital),
        "findings": {key: [one._asdict() for one in found] for key, found in findings.items()},
    }


@click.command()
@given.profile_option
@given.folder_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(profile: str, options: RunOptions, as_json: bool) -> None:
    """Check if this machine can run a profile, and what is missing.

    Checks packages, devices, disks, data, weights and results. Nothing is run, downloaded or
    changed. Exit codes: 0 the profile can run, 1 it cannot.
    """
    report = examine(profile, options, given.adapter())
    can_run = report["can_run"]
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        console = PrintableConsole()
        for title, found in report["findings"].items():
            console.print(title, style="bold")
            for one in found:
                state = "PROBLEM" if one["state"] == "problem" else one["state"]
                fix = f"\n{' ' * 11}fix: {one['fix']}" if one["fix"] else ""
                line, colour = f"  {state:<8} {one['text']}{fix}", _COLOURS[one["state"]]
                console.print(line, style=colour, soft_wrap=True)
        words = "can run." if can_run else "cannot run: see the lines marked PROBLEM."
        colour = _COLOURS["ok" if can_run else "problem"]
        console.print(f"\nProfile {profile} {words}", style=colour, soft_wrap=True)
    click.get_current_context().exit(0 if can_run else 1)
