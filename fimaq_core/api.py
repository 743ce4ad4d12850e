"""Quantization in a few lines: a model and images in, a quantized copy out."""

import copy
import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveInt, ValidationError, field_validator
from torch import Tensor, nn

from fimaq_core import NUMERICS_VERSION, checkpoint
from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, state_sha256
from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, DataError, ModelError, first_problem
from fimaq_core.families import find_family
from fimaq_core.families.own import described, names_of, own_chain
from fimaq_core.fisher.divergence import ClassifierDivergence, CosineDivergence, Divergence
from fimaq_core.layers import set_quantized
from fimaq_core.mixed_bits import apply_bits_map
from fimaq_core.pipeline import quantize_chain
from fimaq_core.progress import progress_bars, silent
from fimaq_core.recipe import Recipe, make_recipe
from fimaq_core.reconstruction.log import ReconstructionLog, read_log
from fimaq_core.reconstruction.mlp import use_relu
from fimaq_core.resources import Placement, Resources
from fimaq_core.samples import Samples

if TYPE_CHECKING:
    from fimaq_core.export.check import CodeCheck

#: Recipe fields that count images, with the least number that each field allows.
_COUNTS = dict.fromkeys(("calibration_images", "range_images", "batch_size", "mlp_batch"), 1)
_COUNTS["divergence_batch"] = 2

#: Number of values in a sample at most, for a file of someone else: 2364 x 2364 pixels.
_MOST_VALUES = 2**24

#: Blocks and head of a custom module.
_Parts = tuple[Iterable[nn.Module] | None, nn.Module | None]


class _SavedModel(Strict, strict=True):
    """Header of a saved :class:`QuantizedModel`."""

    stage: Literal["quantized"] = "quantized"
    segments: list[str]
    shape: list[PositiveInt] = Field(max_length=3)
    dtype: Literal["float32", "int64"] = "float32"
    log: dict[str, Any]

    @field_validator("shape")
    @classmethod
    def _bounded(cls, shape: list[int]) -> list[int]:
        if math.prod(shape) > _MOST_VALUES:
            raise ValueError(f"a sample has over {_MOST_VALUES} values")
        return shape


class QuantizedModel(nn.Module):
    """A quantized copy of a model: images (n, C, H, W) in, logits (n, classes) out.

    Towers of CLIP models return embeddings (n, d), and text towers take token ids (n, L).

    Example::

        q = quantize(model, images, method="fimaq", w_bits=4, a_bits=4, steps=2000)
        logits = q(images)
        q.save("q.safetensors")
        q = load("q.safetensors", model)

    Attributes:
        chain: the model's segments in order; a segment's ``block`` holds the quantized layers.
        recipe: all settings, with the numbers of images actually used.
        log: facts about the reconstruction; empty if the method only calibrates.
    """

    def __init__(
        self, chain: BlockChain, *, log: ReconstructionLog, fingerprint: Fingerprint, like: Tensor
    ) -> None:
        super().__init__()
        self.chain, self.recipe, self.log = chain, fingerprint.recipe, log
        self._fingerprint, self._like = fingerprint, like
        self.eval()

    @property
    def notes(self) -> list[str]:
        """Sentences about deviations from the settings."""
        return self.log.sentences()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.chain(images)
        return logits

    def save(self, path: str | Path) -> None:
        """Write a safetensors file for :func:`load`. Raises CheckpointError if that fails."""
        header = _SavedModel(
            segments=_labels(self.chain),
            shape=list(self._like.shape[1:]),
            dtype="float32" if self._like.is_floating_point() else "int64",
            log=asdict(self.log),
        )
        state, facts = self.chain.state_dict(), header.model_dump()
        checkpoint.save_checkpoint(Path(path), state, self._fingerprint, facts)

    def export(
        self,
        path: str | Path,
        *,
        images: Tensor | None = None,
        packed: bool = False,
        signed: bool = False,
        normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> "CodeCheck":
        """Write an ONNX file that computes with integers, and compare its codes with the model's.

        Args:
            path: the file to write.
            images: (n, C, H, W) images of the comparison, normalised; three images of noise if not
                given. Text models take token ids (n, L).
            packed: True stores weights of 2 to 4 bits in 2 to 4 bits.
            signed: True makes int8 activations with a zero point of 0, for engines that need it.
            normalise: means and standard deviations per channel of images in 0..1. The file then
                takes uint8 images (n, H, W, C) and normalises them itself.

        Raises:
            RecipeError: a quantizer of the recipe has no integer form.
            ModelError: the extra [export] is not installed, the model cannot be exported, or codes
                differ away from a rounding tie; then no file is left.
            CheckpointError: the file cannot be written.
        """
        from fimaq_core.export.check import checked_export
        from fimaq_core.export.facts import OnnxFacts

        recipe = self.recipe
        facts = OnnxFacts(
            model=self._fingerprint.model,
            weights_sha256=self._fingerprint.weights,
            recipe=recipe.model_dump(mode="json"),
            recipe_digest=recipe.digest(),
            normalised=normalise is None,
            packed=packed,
            signed=signed,
            layers=[],
        )
        inputs = (self._like if images is None else images).cpu()
        on_cpu = all(value.device.type == "cpu" for value in self.chain.parameters())
        chain = self.chain if on_cpu else copy.deepcopy(self.chain).cpu()
        return checked_export(chain, inputs, Path(path), facts, normalise=normalise)


def quantize(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    method: str = "fimaq",
    blocks: Iterable[nn.Module] | None = None,
    head: nn.Module | None = None,
    divergence: Divergence | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    placement: Placement = "device",
    **settings: Any,
) -> QuantizedModel:
    """Quantize a copy of a model. The model itself stays as it is.

    Args:
        model: a ViT, DeiT or Swin of timm, or any module whose ``blocks`` and ``head`` are given.
        images: (n, C, H, W) calibration images with the model's transform, or batches of images,
            such as a DataLoader. Other parts of a batch, such as labels, are ignored. The first
            ``calibration_images`` images are used. For a text model: (n, L) int64 token ids.
        method: a name from :data:`fimaq_core.recipe.METHODS`.
        blocks: blocks of your own module, in the order in which its forward applies them.
        head: last part of your own module; nothing may follow it.
        divergence: divergence for the Fisher information; by default the KL divergence of class
            probabilities or, for a model without classifier, :class:`.CosineDivergence` of its
            features.
        progress: True to show progress bars on a terminal or in a notebook.
        device: device of the computation; by default that of the model.
        placement: place of the cached block inputs: "device", "host" or "disk".
        settings: recipe fields that replace the method's, such as ``w_bits``, ``a_bits`` and
            ``steps``; or ``budget="fast"``, short for few steps and their rates. Numbers of images
            are lowered to the number of given images, with a note.

    Raises:
        RecipeError: an unknown method or setting, or a value that does not fit.
        ModelError: the model or a part of it is not supported.
        DataError: no images, or images that the model does not accept.
        NumericsError: NaN or infinity in weights, activations or a loss.
    """
    recipe = make_recipe(method, settings)
    x = _gathered(images, recipe.calibration_images)
    recipe, notes = _clipped(recipe, len(x))
    like = _like(x.shape[1:], x.is_floating_point())
    chain = _chain_of(model, (blocks, head), like, recipe, device)
    content = hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest()
    fingerprint = Fingerprint(
        model=_name(model), weights=state_sha256(model), calibration=content, recipe=recipe
    )
    if divergence is None:
        classes = any(segment.kind == "head" for segment in chain)
        divergence = ClassifierDivergence(recipe.temperature) if classes else CosineDivergence()
    with progress_bars() if progress else nullcontext(silent) as on_progress:
        log = quantize_chain(
            chain, Samples(x), recipe, divergence, Resources(on_progress, placement)
        )
    log.notes[:0] = notes
    return QuantizedModel(chain, log=log, fingerprint=fingerprint, like=like)


def load(
    path: str | Path,
    model: nn.Module,
    *,
    blocks: Iterable[nn.Module] | None = None,
    head: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> QuantizedModel:
    """Load a quantized model that :meth:`QuantizedModel.save` wrote.

    Args:
        path: the file.
        model: the float model that was quantized; it stays as it is.
        blocks, head: the same as in :func:`quantize`.
        device: device of the quantized model; by default that of ``model``.

    Raises:
        CheckpointError: the file is missing, damaged, or made from another model.
        ModelError: a model or part that is not supported.
    """
    path = Path(path)
    fingerprint, content = checkpoint.read_header(path)
    try:
        header = _SavedModel.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error)
        raise CheckpointError(f"{path} holds no quantized model of save() ({problem}).") from error
    own = {"numerics": NUMERICS_VERSION, "model": _name(model), "weights": state_sha256(model)}
    reason = fingerprint.model_copy(update=own).mismatch(fingerprint)
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}. Give the float model that was quantized.")
    like = _like(header.shape, header.dtype == "float32")
    chain = _chain_of(model, (blocks, head), like, fingerprint.recipe, device)
    if _labels(chain) != header.segments:
        theirs = ", ".join(header.segments)
        raise CheckpointError(f"{path} was made with other blocks or another head: give {theirs}.")
    if fingerprint.recipe.reconstruct_mlp:
        use_relu(chain)
    checkpoint.load_checkpoint(path, chain, None)
    set_quantized(chain, True)
    try:
        with torch.no_grad():
            chain(like[:1].to(next(chain.parameters()).device))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path} has ranges that do not fit the model: {text}.") from error
    log = read_log(header.log, path)
    return QuantizedModel(chain, log=log, fingerprint=fingerprint, like=like)


def _chain_of(
    model: nn.Module, parts: _Parts, like: Tensor, recipe: Recipe, device: torch.device | str | None
) -> BlockChain:
    """Return a copy of the model as a chain. Raises ModelError, DataError."""
    blocks, head = parts
    if (blocks is None) != (head is None):
        raise ModelError("Give both blocks= and head=, or none of them for a model of timm.")
    labels: list[str] = []
    if blocks is None or head is None:
        family = find_family(model)
    else:
        labels = [*names_of(model, blocks, "blocks="), *names_of(model, [head], "head=")]
    twin = copy.deepcopy(model).eval().float().requires_grad_(False)
    if device is not None:
        twin.to(device)
    place = next((value.device for value in twin.parameters()), torch.device("cpu"))
    probe = like.to(place)
    try:
        with torch.no_grad():
            twin(probe)
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        shape = tuple(probe.shape[1:])
        raise DataError(
            f"{type(model).__name__} does not take images of shape {shape} ({error}): "
            "give images (n, C, H, W) transformed as the model takes them."
        ) from error
    with torch.random.fork_rng(devices=[]):  # new layers draw initial weights
        chain = own_chain(twin, labels, probe, recipe) if labels else family.build(twin, recipe)
    apply_bits_map({"": chain}, recipe.bits_map)
    return chain.to(place)


def _like(shape: Sequence[int], images: bool) -> Tensor:
    """Return three samples of a shape to trace a model's forward: noise images, or token ids."""
    if not images:
        return torch.zeros(3, *shape, dtype=torch.int64)
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def _gathered(images: Tensor | Iterable[Any], wanted: int) -> Tensor:
    """Return the first ``wanted`` images, float32 (n, C, H, W). Raises DataError."""
    parts: list[Tensor] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        part = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(part, Tensor) or not (
            (part.ndim in (3, 4) and part.is_floating_point())
            or (part.ndim == 2 and part.dtype == torch.int64)
        ):
            raise DataError(
                f"images must be a float tensor (n, C, H, W) or batches of such tensors, not "
                f"{described(part)}: transform the images as the model takes them."
            )
        parts.append(part.detach()[None] if part.ndim == 3 else part.detach())
        if sum(map(len, parts)) >= wanted:
            break
    if not sum(map(len, parts)):
        raise DataError("There are no calibration images: give at least one.")
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise DataError(f"Images of shapes {shapes[0]}, {shapes[1]}: transform them to one size.")
    samples = torch.cat(parts)[:wanted]
    return samples.float() if samples.is_floating_point() else samples


def _clipped(recipe: Recipe, count: int) -> tuple[Recipe, list[str]]:
    """Return the recipe with counts of at most ``count`` images, and a note on lowered counts."""
    possible = {name: max(count, least) for name, least in _COUNTS.items()}
    if recipe.finish_steps:
        held_out = min(recipe.finish_held_out, max(count // 2, 1))
        possible |= {"finish_held_out": held_out, "finish_batch": max(count - held_out, 1)}
    lowered = {name: value for name, value in possible.items() if getattr(recipe, name) > value}
    unused = {"divergence_batch"}
    unused |= set() if recipe.reconstruct else {"batch_size"}
    unused |= set() if recipe.reconstruct_mlp else {"mlp_batch"}
    used = [(name, value) for name, value in lowered.items() if name not in unused]
    changes = [f"{name} {value} instead of {getattr(recipe, name)}" for name, value in used]
    note = f"There are {count} calibration images, so these were lowered: {', '.join(changes)}."
    return recipe.model_copy(update=lowered), [note] if changes else []


def _name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _labels(chain: BlockChain) -> list[str]:
    return [segment.label for segment in chain]
