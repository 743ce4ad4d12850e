"""The command ``sensitivity`` and the bits that it suggests, on a demo model."""

import json
from pathlib import Path

import pytest
import yaml
from test_command_line import command

from tasks.common.record import read_record

FEW = ["--method", "rtn", "--calibration-images", 32, "--range-images", 32]
FEW += ["--calibration-transform", "eval", "--threads", 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder with facts and map of a demo model, and the text that the command printed."""
    folder = tmp_path_factory.mktemp("sensitivity")
    files = ["--json", folder / "facts.json", "--write-bits-map", folder / "map.yaml"]
    few = ["--images", 8, "--mean-bits", 4, "--widths", "3,4,6"]
    done = command("sensitivity", "demo_vit", *FEW, *few, *files)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_layers_are_ranked_and_bits_keep_the_budget(made: tuple[Path, str]) -> None:
    folder, text = made
    facts = json.loads((folder / "facts.json").read_text())
    losses = [row["exact"] for row in facts["operands"]]
    assert losses == sorted(losses, reverse=True)
    assert facts["rank_correlation"] > 0.9
    assert f"(Spearman): {facts['rank_correlation']:.3f}" in text
    own = facts["suggestion"]
    assert own["bits"] == yaml.safe_load((folder / "map.yaml").read_text())
    assert max(own["weight_bits"], own["input_bits"]) <= 4
    assert own["divergence"] < own["uniform"]["4"]
    values = {(row["layer"], row["operand"]): row["values"] for row in facts["operands"]}
    weights = {name: bits["w"] for name, bits in own["bits"].items() if "w" in bits}
    total = sum(values[name, "w"] for name in weights)
    mean = sum(values[name, "w"] * width for name, width in weights.items()) / total
    assert own["weight_bits"] == pytest.approx(mean)
    # Norms are reparameterised only if weight and input have equal bits; rtn does not do so.
    assert any(bits.get("w") != bits["a"] for bits in own["bits"].values() if {"w", "a"} <= {*bits})


@pytest.mark.slow
def test_a_run_quantizes_by_the_map_and_says_so(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = made
    bits = yaml.safe_load((folder / "map.yaml").read_text())
    results = tmp_path / "runs"
    place = ["--model", "demo_vit", *FEW, "--limit", 64, "--results", results]
    done = command("run", *place, "--bits-map", folder / "map.yaml")
    assert done.returncode == 0, done.stderr
    (path,) = [path for path in results.rglob("result.json") if "/fp/" not in path.as_posix()]
    record = read_record(path)
    assert record.variant.startswith("bits_map=mixed ")
    assert (record.w_bit, record.a_bit) == (4, 4)
    assert record.recipe is not None
    assert record.modules is not None
    assert record.recipe["bits_map"] == bits
    for layer in record.modules.quantized:
        own = bits[layer.name]
        assert layer.input_bits == own.get("a", 32)
        if layer.other_bits is None:
            assert layer.weight_bits == own["w"]
        else:
            assert layer.other_bits == own["b"]
    checkpoint = path.parent / "quantized.safetensors"
    inspected = json.loads(command("inspect", checkpoint, "--json").stdout)
    sizes = {layer["name"]: layer["size_bits"] for layer in inspected["layers"]}
    weights = {layer["name"]: layer["weights"] for layer in inspected["layers"]}
    assert all(sizes[name] == weights[name] * own["w"] for name, own in bits.items() if "w" in own)

    found = command("sensitivity", checkpoint, "--images", 4, "--threads", 1)
    assert found.returncode == 0, found.stderr
    assert "head" in found.stdout
    twice = command("sensitivity", checkpoint, "--w-bits", 3)
    assert "has its own recipe: leave w_bits out" in twice.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--write-bits-map", "x.yaml"], "give --mean-bits or --bops"),
        (["--mean-bits", "4", "--bops", "1"], "give --mean-bits or --bops"),
        (["--mean-bits", "4", "--widths", "3,9"], "give bits from 2 to 8, such as 3,4,6"),
        (["--method", "fp"], "Method 'fp' has no stages"),
        (["--bits-map", "none.yaml"], "Cannot read the bits map none.yaml"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], words: str) -> None:
    done = command("sensitivity", "demo_vit", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_map_with_an_unknown_layer_ends_before_calibration(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("blocks.0.attn.qvk: {w: 3}\n")
    out = tmp_path / "out.safetensors"
    done = command("calibrate", "--model", "demo_vit", *FEW, "--bits-map", path, "--out", out)
    assert done.returncode == 2
    assert "Did you mean 'blocks.0.attn.qkv'?" in done.stderr
    assert not out.exists()
