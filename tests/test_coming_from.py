"""docs/coming-from.md: its commands run, its options exist, no released flag is missing."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest

from fimaq_core.checkpoint import read_header
from fimaq_core.recipe import OFF, Recipe, make_recipe
from tasks.common.cli.commands import build_group, main
from tasks.common.record import read_record

pytestmark = pytest.mark.slow

COMMON = "All three"
REPOSITORIES = ("FIMA-Q", "APHQ-ViT", "AdaLog")

#: Demo models in place of real models.
DEMO = {"vit_small": "demo_vit", "deit_tiny": "demo_deit", "mask_rcnn_swin_tiny": "demo_mask_rcnn"}
#: Options of real models that a demo model has no use for.
REAL = ("--data", "--device", "--weights")
#: Settings small enough for a test, given where a command takes them.
SMALL = {
    "--steps": "2", "--mlp-steps": "2", "--calibration-images": "32", "--range-images": "4",
    "--range-candidates": "32",
    "--range-rounds": "1", "--batch-size": "8", "--limit": "64", "--threads": "1",
}  # fmt: skip
#: Other settings of a task that takes images one by one.
SMALLER = {
    "detection": {
        "--calibration-images": "2",
        "--range-images": "1",
        "--batch-size": "1",
        "--limit": "4",
    }
}

#: Flags of the three parsers (test_quant.py) and of READMEs (earlier and misspelt ones too), and
#: config fields.
SHARED_FLAGS = """
    --model --config --dataset --calib-size --calib-batch-size --val-batch-size --num-workers
    --device --calibrate --load-calibrate-checkpoint --test-calibrate-checkpoint --optimize
    --load-optimize-checkpoint --test-optimize-checkpoint --print-freq --seed --w_bit --a_bit
    optim_size calib_size optim_batch_size calib_batch_size w_bit a_bit qconv_a_bit qhead_a_bit
    matmul_head_channel_wise eq_n search_round keep_gpu
"""
OWN_FLAGS = {
    "FIMA-Q": """
        --optim-size --optim-batch-size --calib-metric --optim-metric --optim-mode --drop-prob --k
        --p1 --p2 --dis-mode
        calib_metric token_channel_wise optim_metric temp k p1 p2 dis_mode optim_mode drop_prob
    """,
    "APHQ-ViT": """
        --reconstruct-mlp --load-reconstruct-checkpoint --test-reconstruct-checkpoint --recon-metric
        --calib-metric --optim-metric --optim-mode --drop-prob --pct
        calib_metric token_channel_wise optim_metric use_mean_hessian temp recon_metric pct
        optim_mode drop_prob
    """,
    "AdaLog": "--s_bit s_bit post_softmax_quantizer post_gelu_quantizer fpcs steps train_act",
}
#: Values these flags and fields take or took there, and flags that never were.
OTHER_NAMES = {
    "FIMA-Q": (
        "fisher_dplr fisher_lr fisher_lr+diag mae mse qinp rinp qdrop"
        " --reconstruct-mlp --load-reconstruct-checkpoint"
    ),
    "APHQ-ViT": "--val-batchsize hessian hessian_perturb hessian_brecq mae mse qinp rinp qdrop",
    "AdaLog": "log2 logsqrt2 adalog ptq4vit",
}


def _text() -> str:
    return (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    (body,) = re.findall(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", _text(), re.S | re.M)
    return str(body)


def commands(text: str) -> list[list[str]]:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = blocks.splitlines()
    words = [shlex.split(line) for line in lines]
    assert all(line[:2] == ["python", "-m"] for line in words)
    return [line[2:] for line in words]


def task_of(words: list[str]) -> str:
    package, task = words[0].split(".")
    assert package == "tasks"
    return task


def rows(text: str) -> list[list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [
        row for row in cells if row[0] not in ("there", "config") and not row[0].startswith("---")
    ]


def code(text: str) -> list[str]:
    """The words in code spans; commands of this project do not count."""
    text = re.sub(r"```sh\n.*?```", "", text, flags=re.S)
    return " ".join(re.findall(r"`([^`]+)`", text)).replace(",", " ").split()


def subcommands() -> dict[str, click.Command]:
    return build_group("classification", "test").commands


def options_of(command: click.Command) -> set[str]:
    return {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def small(words: list[str]) -> list[str]:
    """A command of the page (its module first) for a demo model, with few images and steps."""
    options, few = options_of(subcommands()[words[1]]), SMALL | SMALLER.get(task_of(words), {})
    kept: list[str] = []
    for before, word in pairwise(["", *words]):
        if word not in REAL and before not in REAL:
            kept.append(DEMO[word] if before == "--model" else word)
    return [
        *kept,
        *(part for flag, value in few.items() if flag in options for part in (flag, value)),
    ]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line in this process; what it printed."""
    status = None
    try:
        main(build_group(task_of(words), "test"), words[1:])
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert not status, f"{words}: {output.err}"
    return output.out


@pytest.mark.parametrize("name", [COMMON, *REPOSITORIES])
def test_commands_run_in_their_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made: set[str] = set()
    lines = [small(words) for words in commands(section(name))]
    assert len(lines) >= (1 if name == COMMON else 4)
    for words in lines:
        loaded = [
            word
            for before, word in pairwise(words)
            if word.endswith(".safetensors") and before != "--out"
        ]
        assert made.issuperset(loaded), f"{words}: no command before makes {loaded}"
        output = run(words, capsys)
        if "--out" in words:
            out = words[words.index("--out") + 1]
            made.add(out)
            fingerprint, facts = read_header(Path(out))
            expected = {
                "reconstruct-mlp": "mlp",
                "calibrate": "calibrated",
                "reconstruct": "reconstructed",
            }
            assert facts["stage"] == expected[words[1]]
            if words[1] == "reconstruct":
                assert fingerprint.recipe.digest("ranges") == read_header(Path(words[2]))[
                    0
                ].recipe.digest("ranges")
        elif words[1] == "run":
            (path,) = re.findall(r"^record: (.*)$", output, re.M)
            record = read_record(Path(path))
            assert (record.n, record.method) == (
                4 if task_of(words) == "detection" else 64,
                words[words.index("--method") + 1],
            )
        else:
            assert "(n = 64)" in output


@pytest.mark.parametrize("name", [COMMON, *REPOSITORIES])
def test_every_option_named_here_exists(name: str) -> None:
    for words in commands(section(name)):
        flags = {word for word in words if word.startswith("--")}
        assert flags <= options_of(subcommands()[words[1]]), words
    every = set().union(*(options_of(command) for command in subcommands().values()))
    named = [word for row in rows(section(name)) for word in code(row[1]) if word.startswith("--")]
    assert named
    assert set(named) <= every


@pytest.mark.parametrize("name", REPOSITORIES)
def test_no_flag_of_theirs_is_left_out(name: str) -> None:
    text = section(COMMON) + section(name)
    first = {word for row in rows(text) for word in code(row[0])}
    assert set(f"{SHARED_FLAGS} {OWN_FLAGS[name]}".split()) <= first
    assert set(OTHER_NAMES[name].split()) <= set(code(text))


def _settings(bits: int, **others: Any) -> dict[str, Any]:
    """Settings that all their configs share, by the names here, changed by ``others``."""
    same = {
        "w_bits": bits, "a_bits": bits, "classifier_bits": bits, "softmax_bits": bits,
        "patch_input_bits": OFF,
        "calibration_images": 1024, "range_images": 128, "batch_size": 32, "range_candidates": 128,
        "range_rounds": 3,
        "range_search": "output-error", "softmax_quantizer": "uniform",
        "gelu_quantizer": "uniform", "per_token": False,
        "loss": "mse", "prefix_prob": 0.5, "activation_prob": 0.5, "temperature": 20.0,
        "learn_scales": True, "loss_start": None,
        "reconstruct_mlp": False, "reconstruct": True, "steps": 20_000, "reparameterize": True,
    }  # fmt: skip
    return same | others


def _fimaq(bits: int) -> dict[str, Any]:
    parts = {"fisher_k": 5, "fisher_p1": 1.0, "fisher_p2": 1.0, "fisher_mode": "q"}
    return _settings(bits, loss="fisher_dplr", per_token=True, **parts)


def _aphq(bits: int, percentile: float, **others: Any) -> dict[str, Any]:
    mlps = {
        "reconstruct_mlp": True,
        "mlp_percentile": percentile,
        "mlp_loss": "perturb_mean",
        "mlp_steps": 20_000,
    }
    return _settings(bits, **({"loss": "perturb_mean"} | mlps | others))


def _brecq(bits: int, prefix: float = 0.0) -> dict[str, Any]:
    return _settings(bits, prefix_prob=prefix, activation_prob=1.0)


def _adalog(bits: int, reconstruct: bool) -> dict[str, Any]:
    special = {
        "softmax_quantizer": "adalog",
        "gelu_quantizer": "adalog",
        "range_search": "progressive",
        "range_images": 32,
    }
    if reconstruct:
        return _brecq(bits) | special | {"loss": "mse_adalog"}
    found = _settings(bits, **special, calibration_images=32, reconstruct=False)
    return {
        name: value
        for name, value in found.items()
        if name not in ("loss", "prefix_prob", "activation_prob")
    }


def _configs(name: str) -> dict[str, dict[str, Any]]:
    if name == "FIMA-Q":
        return {f"{bits}bit/best.py": _fimaq(bits) for bits in (3, 4, 6)} | {
            "3bit/brecq.py": _brecq(3)
        }
    if name == "AdaLog":
        calibrated = {f"{bits}bit.py --calibrate": _adalog(bits, False) for bits in (3, 4, 6)}
        return calibrated | {
            f"{bits}bit.py --calibrate --optimize": _adalog(bits, True) for bits in (3, 4, 6)
        }
    found = {
        "2bit/best.py": _aphq(2, 0.98, per_token=True),
        "3bit/best.py": _aphq(3, 0.99),
        "4bit/best.py": _aphq(4, 0.98),
        "3bit/ablation_avg.py": _aphq(3, 0.99, loss="perturb"),
        "3bit/ablation_brecq_hessian.py": _aphq(3, 0.99, loss="fisher_brecq"),
        "2bit/qdrop_baseline.py": _settings(2, per_token=True),
    }
    for bits in (3, 4):
        found[f"{bits}bit/qdrop_baseline.py"] = _settings(bits)
        found[f"{bits}bit/brecq_baseline.py"] = _brecq(bits)
        found[f"{bits}bit/brecq_qinp.py"] = _brecq(bits, prefix=1.0)
    return {config: fields | {"loss_start": 2.0} for config, fields in found.items()}


def recipe_of(options: str) -> Recipe:
    words = ["--model", "demo_vit", *shlex.split(options)]
    given = subcommands()["run"].make_context("run", words).params
    changes = {name: given[name] for name in Recipe.model_fields if given.get(name) is not None}
    return make_recipe(changes.pop("method"), changes)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_config_files_are_the_recipes_they_were(name: str) -> None:
    expected = _configs(name)
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(section(name)) if ".py" in row[0]}
    assert table.keys() == expected.keys()
    for config, options in table.items():
        recipe = recipe_of(options)
        assert {field: getattr(recipe, field) for field in expected[config]} == expected[config], (
            config
        )
