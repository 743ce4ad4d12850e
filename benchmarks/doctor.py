"""``python -m benchmarks doctor``: what this machine can run, what is missing, and how to get it.

PyTorch may crash while it loads, so another process imports it: ``python -m benchmarks.doctor``
prints the findings about PyTorch as JSON.
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import size_text
from benchmarks.costs.sources import gather
from benchmarks.grid import options as given
from benchmarks.grid.cell import Adapter, RunOptions
from benchmarks.grid.expand import GRIDS, Filters, expand, load_grid
from benchmarks.grid.preflight import missing, weights_place
from fimaq_core.errors import FimaqError
from tasks.common.cell.machine import container_limits, processor

LOCK = Path(__file__).resolve().parents[1] / "requirements" / "lock.txt"
SETUP = "make setup"
#: Free bytes below which a disk is worth a note.
LITTLE = 5e9
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


class Finding(NamedTuple):
    """Result of one check: a ``note`` is worth knowing, a ``problem`` prevents a run."""

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
    except Exception as error:  # noqa: BLE001 the doctor examines broken machines
        text = f"{check} cannot be examined: {type(error).__name__}: {error}"
        found.append(Finding("problem", text))
    return found


def unmet(requirements: Iterable[str]) -> list[str]:
    """Return the requirements that the installed packages do not meet."""
    from packaging.requirements import Requirement

    found = []
    for one in map(Requirement, requirements):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                has = metadata.version(one.name)
            except metadata.PackageNotFoundError:
                has = None
            if not has or not one.specifier.contains(has, prereleases=True):
                found.append(f"{one.name} is {has or 'missing'}; wanted: {one.specifier or 'any'}")
    return found


def package_findings(lock: Path = LOCK) -> Iterator[Finding]:
    """Report Python, unmet dependencies, and other differences from the lock file."""
    yield Finding("ok", f"Python {platform.python_version()} ({sys.executable})")
    for text in unmet(["fimaq"]) or unmet(metadata.requires("fimaq") or ()):
        yield Finding("problem", text, SETUP)
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    wanted = [line.partition(" #")[0] for line in lines if line[:1].isalnum()]
    others = unmet(wanted)
    text = f"{len(wanted) - len(others)} of {len(wanted)} packages are as in {lock.name}"
    more = f": {', '.join(others)}" if others else ""
    yield Finding("note" if others else "ok", text + more, SETUP if others else "")


def torch_findings() -> Iterator[Finding]:
    """Report PyTorch, its GPUs, and the compiler that it finds."""
    import torch
    from torch.utils import collect_env as env

    from fimaq_core.reconstruction.engines import cpp_compiler

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    level = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", f"PyTorch {torch.__version__}, {build}, {level} on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"cuda:{index}: {gpu.name}, {size_text(gpu.total_memory)}, {gpu.major}.{gpu.minor}"
        try:
            torch.ones(1, device=f"cuda:{index}").add_(1).item()
            yield Finding("ok", text)
        except RuntimeError as error:  # no kernels for this GPU, no free memory, or in use
            text += f"; PyTorch cannot use it: {str(error).splitlines()[0]}"
            fix = "end other programs on it, or install a PyTorch that is built for it"
            yield Finding("note", text, fix)
    driver = env.get_nvidia_driver_version(env.run)  # type: ignore[no-untyped-call]
    if driver and not torch.cuda.device_count():
        text = f"the driver {driver} is there, but PyTorch ({build}) sees no GPU"
        yield Finding("note", text, "update the driver, or look at CUDA_VISIBLE_DEVICES")
    if cpp_compiler() is None:
        text = "no C++ compiler: on a CPU the step engine 'fused' runs instead of 'compiled'"
        yield Finding("note", text, "install g++ or clang++")


def ask_torch(seconds: float = 180.0) -> list[Finding]:
    """Return :func:`torch_findings` of another process, or why that process failed."""
    command = [sys.executable, "-m", "benchmarks.doctor"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        why = f"no answer within {seconds:.0f} s"
    else:
        if done.returncode == 0:
            return [Finding(*each) for each in json.loads(done.stdout.splitlines()[-1])]
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"its process ended with {done.returncode}"
    return [Finding("problem", f"PyTorch does not load: {why}", SETUP)]


def machine_findings(limits: Mapping[str, float | None]) -> Iterator[Finding]:
    """Report processor and memory, and the limits of a container."""
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
    """Report whether the results folder can be written, and the free space of three folders."""
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
    """Report first whether a profile can run, then what is missing, and its largest memory.

    Args:
        name: the profile.
        options: folders of data, weights and results.
        adapter: knows what cells need.
        cuda: True if PyTorch sees a GPU.
        memory: bytes that may be used.
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
    for cell in {cell.model: cell for cell in cells}.values():
        found = lacking[cell.section]
        if not found or any("the weights" in message for message in found):
            command = weights_place(cell).command
            if command:
                yield Finding("note", f"the weights of {cell.model} are at a hub", command)
    if grid.device == "auto" and not cuda:
        yield Finding("note", "no GPU is visible, and this profile takes very long without one")
    costs, _ = gather(cells, adapter, [grid.name], options.results)
    known = [(cost.memory or 0, cell.label, cost) for cell in cells if (cost := costs.of(cell))]
    most, label, cost = max(known, key=lambda one: one[0], default=(0, "", None))
    if most and cost:
        text = f"{label} takes {size_text(most)} of memory ({cost.origin})"
        little = most > memory and not cuda
        text += f", and {size_text(memory)} may be used here" if little else ""
        yield Finding("note" if little else "ok", text)


def examine(profile: str, options: RunOptions, adapter: Adapter) -> dict[str, Any]:
    """Run all checks on the machine and on all profiles; return the content of ``--json``."""
    torch, limits = ask_torch(), container_limits()
    needs = options, adapter, any(one.text.startswith("cuda:") for one in torch)
    memory = limits["memory"] or psutil.virtual_memory().total
    others = []
    for name in sorted({path.stem for path in GRIDS.glob("*.yaml")} - {profile}):
        (one,) = guarded(name, lambda *args: islice(profile_findings(*args), 1), name, *needs, 0.0)
        fix = f"doctor --profile {name} says why"
        others.append(one if one.state == "ok" else Finding("note", one.text, fix))
    findings = {
        "Python and packages": guarded("packages", package_findings) + torch[:1],
        "Machine": torch[1:] + guarded("machine", machine_findings, limits),
        "Results": guarded("results", results_findings, options.results),
        "Profile": guarded(profile, profile_findings, profile, *needs, memory),
        "Other profiles": others,
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
    """Examine what this machine can run, and what is missing.

    Checks packages, devices, disks, data, weights and results. Nothing is run, downloaded or
    changed. Exit codes: 0 the profile can run, 1 it cannot.
    """
    report = examine(profile, options, given.adapter())
    can_run = report["can_run"]
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        for title, found in report["findings"].items():
            click.secho(title, bold=True)
            for one in found:
                state = "PROBLEM" if one["state"] == "problem" else one["state"]
                fix = f"\n{' ' * 11}fix: {one['fix']}" if one["fix"] else ""
                click.secho(f"  {state:<8} {one['text']}{fix}", fg=_COLOURS[one["state"]])
        words = "can run." if can_run else "cannot run: see the lines marked PROBLEM."
        click.secho(f"\nProfile {profile} {words}", fg=_COLOURS["ok" if can_run else "problem"])
    click.get_current_context().exit(0 if can_run else 1)


if __name__ == "__main__":
    print(json.dumps(list(torch_findings())))
