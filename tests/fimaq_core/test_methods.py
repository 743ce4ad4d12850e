"""Every method runs on every family at all bits, is saved, loaded and resumed, bit for bit."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import chain_of, deit, images, quick, swin, vit
from staged import run_stage
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, save_checkpoint
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.pipeline import CALIBRATE, MLPS, RECONSTRUCT, quantize_chain
from fimaq_core.progress import Progress
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer, WeightQuantizer
from fimaq_core.quantizers.special import LogQuantizer
from fimaq_core.recipe import METHODS, OFF, Recipe
from fimaq_core.reconstruction.mlp import mlps, use_relu
from fimaq_core.reconstruction.state import active_quantizers, rounded_layers
from fimaq_core.store import Part, Resources

pytestmark = pytest.mark.slow

KL = ClassifierDivergence(20.0)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: vit(1), 32),
    "deit": (lambda: deit(1), 32),
    "swin": (lambda: swin(40), 40),
}
#: Of the methods that start with MLP reconstruction.
WITH_MLPS = [name for name, changes in METHODS.items() if changes.get("reconstruct_mlp")]


def recipe_of(method: str, **changes: object) -> Recipe:
    """A recipe for tenths of a second."""
    few: dict[str, object] = {
        "calibration_images": 16, "range_images": 4, "steps": 2, "fisher_k": 1, "mlp_steps": 2,
        "mlp_batch": 8, "mlp_lr": 1e-3,
    }  # fmt: skip
    if METHODS[method].get("finish_steps"):
        few |= {"finish_steps": 2, "finish_batch": 4, "finish_held_out": 4}
    return quick(method, **few, **changes)


def fresh(family: str, recipe: Recipe) -> tuple[BlockChain, Tensor]:
    """A chain that nothing has been done to, and its calibration images."""
    return chain_of(copy.deepcopy(model(family)), recipe), images(16, FAMILIES[family][1])


@functools.cache
def model(family: str) -> nn.Module:
    """To be copied."""
    return FAMILIES[family][0]()


@functools.cache
def full_precision(family: str) -> tuple[Tensor, Tensor]:
    """Images, and the model's own outputs for them."""
    probe = images(6, FAMILIES[family][1], seed=8)
    with torch.no_grad():
        return probe, model(family)(probe)


def quantized(family: str, recipe: Recipe) -> BlockChain:
    chain, x = fresh(family, recipe)
    log = quantize_chain(chain, x, recipe, KL, Resources(batch_size=16))
    # A block whose quantizers are all off has nothing to learn.
    learning = [
        s.label for s in chain if active_quantizers(s) or any(True for _ in rounded_layers(s.block))
    ]
    assert list(log.last_loss) == (learning if recipe.reconstruct else [])
    return chain


@torch.no_grad()
def outputs(chain: BlockChain, x: Tensor, on: bool = True) -> Tensor:
    set_quantized(chain, on)
    return chain(x)


def bits_of(chain: BlockChain) -> dict[str, int]:
    """Bits of every quantizer by its name."""
    return {
        name: module.bits
        for name, module in chain.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def expected_bits(chain: BlockChain, recipe: Recipe) -> dict[str, int]:
    """Bits by the recipe, from the names of layers."""
    found: dict[str, int] = {}
    last = [segment.kind for segment in chain].index("head")
    for name, layer in quant_layers(chain):
        if isinstance(layer, QuantMatMul):
            softmax = name.endswith("attention_value") and recipe.s_bits is not None
            found[f"{name}.a_quantizer"] = recipe.s_bits if softmax else recipe.a_bits
            found[f"{name}.b_quantizer"] = recipe.a_bits
            continue
        found[f"{name}.weight_quantizer"] = recipe.w_bits
        conv = isinstance(layer, QuantConv2d)
        found[f"{name}.input_quantizer"] = recipe.patch_input_bits if conv else recipe.a_bits
        if name.startswith(f"segments.{last}."):
            found[f"{name}.input_quantizer"] = (
                recipe.a_bits if recipe.head_bits is None else recipe.head_bits
            )
    return found


def kinds_of(chain: BlockChain) -> dict[str, str]:
    """Kinds of the activation quantizers that are not uniform ones, by the end of their names."""
    return {
        ".".join(name.split(".")[-2:]): module.kind
        for name, module in chain.named_modules()
        if isinstance(module, ActivationQuantizer) and not isinstance(module, AffineQuantizer)
    }


def check_weights(chain: BlockChain, bits: int) -> None:
    """Each row of every weight takes at most 2^bits values."""
    for name, layer in quant_layers(chain):
        if isinstance(layer, QuantMatMul) or bits == OFF:
            continue
        assert layer.weight_quantizer.codes.dtype == torch.uint8
        rows = layer.weight_quantizer.quantized(layer.weight).flatten(1)
        counts = [len(row.unique()) for row in rows]
        assert max(counts) <= 2**bits, name
        assert max(counts) > 1, name


def check_activations(chain: BlockChain, x: Tensor) -> None:
    """Check that outputs of activation quantizers have as many values as there are codes."""
    seen: list[str] = []

    def check(
        quantizer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        seen.append(quantizer.kind)
        levels = 2**quantizer.bits
        if isinstance(quantizer, AffineQuantizer):
            turned = kwargs.get("transposed", False)
            scale, zero = (
                part.mT if turned else part for part in (quantizer.scale, quantizer.zero_point)
            )
            codes = out / scale + zero
            assert (codes - codes.round()).abs().max() < 1e-3
            assert codes.round().min() >= 0
            assert codes.round().max() <= levels - 1
        else:
            assert quantizer.scale.numel() == 1
            # Logarithmic quantizers have 0 beside their codes.
            assert 1 < len(out.unique()) <= levels + isinstance(quantizer, LogQuantizer)

    handles = []
    for module in chain.modules():
        if (
            isinstance(module, ActivationQuantizer)
            and not isinstance(module, WeightQuantizer)
            and not module.off
        ):
            handles.append(module.register_forward_hook(check, with_kwargs=True))
    outputs(chain, x)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)


def check_saved(chain: BlockChain, family: str, recipe: Recipe, folder: Path) -> None:
    """A new chain with the saved state gives the same bits, quantized and in full precision."""
    mark, path = fingerprint(recipe), folder / "final.safetensors"
    save_checkpoint(path, chain.state_dict(), mark, {"stage": "reconstructed"})
    loaded, _ = fresh(family, recipe)
    if recipe.reconstruct_mlp:
        use_relu(loaded)
    assert load_checkpoint(path, loaded, mark).facts == {"stage": "reconstructed"}
    probe, _ = full_precision(family)
    for on in (True, False):
        assert torch.equal(outputs(loaded, probe, on), outputs(chain, probe, on))


def fingerprint(recipe: Recipe) -> Fingerprint:
    return Fingerprint(weights="w" * 64, calibration="c" * 64, recipe=recipe)


def check(family: str, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
    """Quantize, save and load; return quantized and full-precision outputs."""
    probe, expected = full_precision(family)
    chain = quantized(family, recipe)
    out = outputs(chain, probe)
    assert out.shape == expected.shape
    assert out.isfinite().all()
    assert (out - expected).abs().max() > 1e-3
    assert bits_of(chain) == expected_bits(chain, recipe)
    check_weights(chain, recipe.w_bits)
    check_activations(chain, probe)
    kinds = kinds_of(chain)
    special = {
        "attention_value.a_quantizer": recipe.softmax_quantizer,
        "fc2.input_quantizer": recipe.gelu_quantizer,
    }
    assert kinds == {name: kind for name, kind in special.items() if kind != "uniform"}
    for _, layer in quant_layers(chain):
        if (
            isinstance(layer, QuantLinear)
            and isinstance(layer.input_quantizer, LogQuantizer)
            and not layer.input_quantizer.off
        ):
            assert layer.input_quantizer.folded
            assert layer.quantized_bias.shape == (layer.out_features,)
    activation = nn.ReLU if recipe.reconstruct_mlp else nn.GELU
    assert all(type(mlp.get_submodule("act")) is activation for mlp in mlps(chain))
    if not (recipe.reconstruct_mlp or recipe.finish_steps):
        # Neither reparameterisation nor a refit nor a folded shift changes the float function.
        assert torch.allclose(outputs(chain, probe, on=False), expected, atol=2e-4)
    check_saved(chain, family, recipe, folder)
    return out, expected


#: Each method on each family; each of both at 3 and at 4 bits.
EVERY = [
    (method, family, 3 + (row + column) % 2)
    for row, method in enumerate(name for name in METHODS if name != "mlp-recon")
    for column, family in enumerate(FAMILIES)
]


@pytest.mark.parametrize(("method", "family", "bits"), EVERY)
def test_every_method_on_every_family(method: str, family: str, bits: int, tmp_path: Path) -> None:
    check(family, recipe_of(method, w_bits=bits, a_bits=bits), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_reconstruction_alone_quantizes_nothing(family: str, tmp_path: Path) -> None:
    recipe = recipe_of("mlp-recon")
    assert (recipe.w_bits, recipe.a_bits, recipe.softmax_bits) == (OFF, OFF, OFF)
    check(family, recipe, tmp_path)
    chain, (probe, _) = quantized(family, recipe), full_precision(family)
    assert torch.equal(outputs(chain, probe), outputs(chain, probe, on=False))


MIXED: dict[str, dict[str, object]] = {
    "w3a4": {"w_bits": 3, "a_bits": 4},
    "w2a4": {"w_bits": 2, "a_bits": 4},
    "w2a3": {"w_bits": 2, "a_bits": 3},
    "w8a8": {"w_bits": 8, "a_bits": 8},
    "softmax of 8 bits": {"w_bits": 4, "a_bits": 4, "s_bits": 8},
    "softmax of 2 bits": {"w_bits": 4, "a_bits": 4, "s_bits": 2},
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize(
    "method", ["fimaq", "aphq", "adalog", "adalog-recon", "repq", "erq", "ptq4vit"]
)
def test_mixed_bits(method: str, case: str, tmp_path: Path) -> None:
    recipe = recipe_of(method, **MIXED[case])
    out, expected = check("vit", recipe, tmp_path)
    # With 8 bits little is lost; not so where two steps have trained MLPs with ReLU.
    if case == "w8a8" and not recipe.reconstruct_mlp:
        assert (out - expected).norm() < 0.25 * expected.norm()


PARTLY_OFF: dict[str, dict[str, object]] = {
    "weights alone": {"w_bits": 4, "a_bits": OFF},
    "softmax in full precision": {"w_bits": 4, "a_bits": 4, "s_bits": OFF},
    "softmax and weights": {"w_bits": 4, "a_bits": OFF, "s_bits": 4},
    "softmax alone": {"w_bits": OFF, "a_bits": OFF, "s_bits": 4},
    "classifier's input in full precision": {"w_bits": 4, "a_bits": 4, "head_bits": OFF},
}


@pytest.mark.parametrize(
    ("method", "case"),
    [
        (method, case)
        for method in ("adalog-recon", "erq", "ptq4vit")
        for case, bits in PARTLY_OFF.items()
        if method != "erq" or bits["w_bits"] != OFF  # what ERQ finds is kept in the weights' codes
    ],
)
def test_parts_that_are_off(method: str, case: str, tmp_path: Path) -> None:
    check("vit", recipe_of(method, **PARTLY_OFF[case]), tmp_path)


class Broken(Exception):
    """Stands for a run that was stopped."""


def run(
    recipe: Recipe, folder: Path | None, stop: tuple[str, str] | None = None
) -> tuple[BlockChain, list[tuple[str, str]]]:
    """A whole run of a ViT of two blocks with checkpoints; it may stop at a stage and block.

    Returns the chain, and what was worked on: stages with blocks.
    """
    work: list[tuple[str, str]] = []

    def on_progress(progress: Progress) -> None:
        here = (progress.stage, progress.block or "")
        if here == stop:
            raise Broken
        if here[1] and here not in work:
            work.append(here)

    chain, x, mark = chain_of(vit(2), recipe), images(16), fingerprint(recipe)
    resources = Resources(on_progress, batch_size=8)

    def file(name: str) -> Path | None:
        return None if folder is None else folder / name

    part = Part(chain, x, recipe, KL, mark)
    if recipe.reconstruct_mlp:
        run_stage(MLPS, part, file("mlps.safetensors"), resources=resources)
    run_stage(CALIBRATE, part, file("ranges.safetensors"), resources=resources)
    run_stage(RECONSTRUCT, part, pieces=folder, resources=resources)
    return chain, work


@pytest.mark.parametrize("method", ["adalog-recon", "pdquant", "lsvit", "aphq", "fimaq-mlp"])
def test_a_stopped_reconstruction_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    recipe = recipe_of(method, w_bits=3, a_bits=3)
    undisturbed, work = run(recipe, None)
    probe = images(6, seed=8)
    expected = outputs(undisturbed, probe)
    labels = [block for stage, block in work if stage == "reconstruct"]
    assert labels == ["patch_embed", "blocks.0", "blocks.1", "head"]
    for number in (1, 3):
        folder = tmp_path / labels[number]
        with pytest.raises(Broken):
            run(recipe, folder, ("reconstruct", labels[number]))
        resumed, again = run(recipe, folder)
        blocks = [(stage, label) for stage, label in again if stage != "Fisher pass"]
        assert blocks == [("reconstruct", label) for label in labels[number:]]
        assert torch.equal(outputs(resumed, probe), expected)


@pytest.mark.parametrize("method", WITH_MLPS)
def test_a_stopped_mlp_reconstruction_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    recipe = recipe_of(method, reconstruct=False)
    probe = images(6, seed=8)
    chain, work = run_mlps(recipe, None)
    expected = outputs(chain, probe, on=False)
    assert work == ["blocks.0.mlp", "blocks.1.mlp"]
    with pytest.raises(Broken):
        run_mlps(recipe, tmp_path, "blocks.1.mlp")
    kept = tmp_path / "mlps.mlps" / "mlp-000.safetensors"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    resumed, again = run_mlps(recipe, tmp_path)
    assert again == ["blocks.1.mlp"]
    assert torch.equal(outputs(resumed, probe, on=False), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mlps.safetensors"]
    loaded, nothing = run_mlps(recipe, tmp_path)
    assert nothing == []
    assert torch.equal(outputs(loaded, probe, on=False), expected)


def run_mlps(
    recipe: Recipe, folder: Path | None, stop: str | None = None
) -> tuple[BlockChain, list[str]]:
    """The MLP reconstruction of a ViT of two blocks; it may stop at the start of an MLP.

    Returns the chain, and which MLPs were trained.
    """
    work: list[str] = []

    def on_progress(progress: Progress) -> None:
        if progress.block == stop and stop is not None:
            raise Broken
        if progress.block and progress.block not in work:
            work.append(progress.block)

    chain, x = chain_of(vit(2), recipe), images(16)
    path = None if folder is None else folder / "mlps.safetensors"
    part = Part(chain, x, recipe, KL, fingerprint(recipe))
    run_stage(MLPS, part, path, resources=Resources(on_progress, batch_size=8))
    assert part.teacher is not None
    with torch.no_grad():
        assert torch.equal(part.teacher(x), chain_of(vit(2), recipe)(x))
    return chain, work
