"""A task's commands as a user runs them, on a demo model with few images and steps."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from tasks.common.cli import options
from tasks.common.cli.commands import build_group, main
from tasks.common.record import read_record

QUICK = [
    "--w-bits",
    "4",
    "--a-bits",
    "4",
    "--range-search",
    "minmax",
    "--calibration-images",
    "32",
    "--calibration-transform",
    "eval",
    "--steps",
    "3",
    "--fisher-k",
    "2",
    "--seed",
    "5",
]
PLACE = ["--limit", "64", "--threads", "1"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> Done:
    """Run the command line in this process, so that libraries are imported only once."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(build_group("classification", "test"), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def only_record(results: Path) -> Path:
    (path,) = [path for path in results.rglob("result.json") if "/fp/" not in path.as_posix()]
    return path


def test_run_and_stages_agree_bit_for_bit(tmp_path: Path) -> None:
    results = tmp_path / "runs"
    done = command(
        "run", "--model", "demo_vit", "--method", "fimaq", *QUICK, *PLACE, "--results", results
    )
    assert done.returncode == 0, done.stderr
    path = only_record(results)
    record = read_record(path)
    assert record.n == 64
    assert f"top1 {record.metrics['top1'].value:.2f}" in done.stdout

    ranges, whole = tmp_path / "ranges.safetensors", tmp_path / "whole.safetensors"
    for arguments in (
        ["calibrate", "--model", "demo_vit", *QUICK, *PLACE, "--out", ranges],
        ["reconstruct", ranges, *PLACE, "--out", whole],
    ):
        stage = command(*arguments)
        assert stage.returncode == 0, stage.stderr
    assert (
        whole.read_bytes()[-1000:] == (path.parent / "quantized.safetensors").read_bytes()[-1000:]
    )
    evaluated = command("evaluate", whole, *PLACE)
    assert f"top1 {record.metrics['top1'].value:.2f}" in evaluated.stdout

    with np.load(path.parent / record.outcomes) as outcomes:
        assert outcomes["correct"].mean() * 100 == pytest.approx(record.metrics["top1"].value)
        assert len(set(outcomes["sample"])) == 64

    other = command(
        "reconstruct", ranges, *PLACE, "--w-bits", "3", "--out", tmp_path / "other.safetensors"
    )
    assert other.returncode == 2
    assert "w_bits (4, here 3)" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_second_run_measures_nothing_and_a_list_repeats_the_images(tmp_path: Path) -> None:
    results = tmp_path / "runs"
    arguments = ["run", "--model", "demo_vit", "--method", "rtn", *QUICK, *PLACE]
    assert command(*arguments, "--results", results).returncode == 0
    path = only_record(results)
    written = path.stat().st_mtime_ns
    assert command(*arguments, "--results", results).returncode == 0
    assert path.stat().st_mtime_ns == written

    again = tmp_path / "again"
    assert command(*arguments, "--results", again, "--calibration-list", path).returncode == 0
    first, second = read_record(path), read_record(only_record(again))
    assert first.calibration is not None
    assert second.calibration is not None
    assert (first.calibration.dataset, first.calibration.split) == ("digit-pairs", "train")
    assert (first.calibration.listed, second.calibration.listed) == (False, True)
    assert second.calibration == first.calibration.model_copy(update={"listed": True})
    assert second.metrics == first.metrics

    seeded = tmp_path / "seeded"
    assert (
        command(*arguments[: -len(PLACE)], *PLACE, "--seed", "6", "--results", seeded).returncode
        == 0
    )
    third = read_record(only_record(seeded))
    assert third.calibration is not None
    assert set(third.calibration.ids) != set(first.calibration.ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "demo_vti"], "Did you mean 'demo_vit'?"),
        (["run", "--model", "demo_vit", "--method", "fimaqq"], "Did you mean 'fimaq'?"),
        (["run", "--model", "demo_vit", "--stepz", "3"], "--steps"),
        (["run", "--model", "demo_vit", "--w-bits", "1"], "1 bits is outside 2 to 8"),
        (["run", "--model", "demo_vit", "--loss", "msee"], "Did you mean 'mse'?"),
        (["run", "--model", "demo_vit", "--device", "cuda:99"], "not available"),
        (["run", "--model", "demo_vit", "--model-args", "{"], "not valid JSON"),
        (["run", "--model", "vit_small_patch16_224", "--data", "nowhere"], "names no weights"),
        (["run", "--model", "demo_vit", "--weights", "nowhere.safetensors"], "no weights file"),
        (["evaluate", "nowhere.safetensors"], "no checkpoint"),
    ],
)
def test_bad_input_gives_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "run":
        arguments = [*arguments, "--results", str(tmp_path)]
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_file_sets_fields_and_its_errors_are_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: qdrop\nsteps: 2\nw_bits: 3\n", encoding="utf-8")
    quick = [*QUICK[2:-6], "--seed", "5"]
    done = command(
        "run",
        "--model",
        "demo_vit",
        "--recipe",
        recipe,
        *quick,
        *PLACE,
        "--results",
        tmp_path / "runs",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(only_record(tmp_path / "runs").read_text())
    assert (record["method"], record["w_bit"], record["a_bit"], record["recipe"]["steps"]) == (
        "qdrop",
        3,
        4,
        2,
    )

    recipe.write_text("stepss: 2\n", encoding="utf-8")
    done = command("run", "--model", "demo_vit", "--recipe", recipe)
    assert done.returncode == 2
    assert "Did you mean 'steps'?" in done.stderr


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tasks.classification.demo.models import DEMO

    state = load_file(DEMO.weights_path("demo_vit"))
    state["blocks.1.mlp.fc1.weight"][3, 4] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    done = command(
        "run",
        "--model",
        "demo_vit",
        "--weights",
        tmp_path / "nan.safetensors",
        "--results",
        tmp_path,
    )
    assert done.returncode == 2
    assert "blocks.1.mlp.fc1.weight" in done.stderr


def test_options_win_over_the_budget() -> None:
    found = {}

    @click.command()
    @options.recipe(options.TaskOptions())
    def show(**given: Any) -> None:
        found["recipe"] = options.take_recipe("classification", given)

    show.main(["--budget", "fast", "--lr-scale", "0.5"], standalone_mode=False)
    recipe = found["recipe"]
    assert (recipe.steps, recipe.lr_alpha, recipe.lr_scale) == (500, 0.0132, 0.5)
