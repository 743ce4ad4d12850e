"""Joint finishing: norms, biases and scales are trained through the whole quantized model.

Block losses do not see how the errors of blocks add up. Here the codes of the weights are frozen,
and what costs nothing at inference is trained on one objective at the end of the model:
``D(q, f) + mean((h_q - h_f)²)``, each part over its start value. D is the divergence of the
quantized model's outputs q from the full-precision outputs f, and h is the penultimate feature.
Labels are not used. Some calibration images are held out of training. The state that is best on
them is kept, and the state before the first step is one of the candidates. Block reconstruction
has already seen the images, so the start looks somewhat better than on new ones.

Training norms after quantization is known from Norm Tweaking (Li et al., AAAI 2024,
arXiv:2309.02784).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field, FiniteFloat, ValidationError
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Kept
from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, NumericsError, RecipeError, first_problem
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import WeightLayer, quant_layers, set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import Progress
from fimaq_core.quantizers.activation import ActivationQuantizer, Form
from fimaq_core.quantizers.affine import WeightQuantizer
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.schedule import block_generator, draw_batches
from fimaq_core.reconstruction.state import SCALE_FLOOR
from fimaq_core.reconstruction.tape import Collected, Storage
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples

#: Number of times that the held-out objective is measured during training.
POINTS = 16

#: Samples of a batch: a slice, or their numbers (B,).
Rows = slice | Tensor


class Finishing(Strict, strict=True):
    """Result of :func:`finish`: values of the objective on the held-out images.

    Example::

        finishing = finish(chain, images, recipe, divergence)
        print(finishing.sentence())
    """

    start: FiniteFloat  # before the first step
    best: FiniteFloat  # of the state that is kept
    step: int = Field(ge=0)  # step after which the state is kept; 0 is the start
    steps: int = Field(ge=1)

    def sentence(self) -> str:
        """Return the result in words."""
        return (
            f"finishing: held-out objective {self.start:.3f} -> {self.best:.3f} at step "
            f"{self.step} of {self.steps}"
        )


def read_finishing(facts: object, where: Path) -> Finishing:
    """Return the result whose JSON form the checkpoint ``where`` holds. Raises CheckpointError."""
    try:
        return Finishing.model_validate(facts)
    except ValidationError as error:
        raise CheckpointError(
            f"The checkpoint {where} does not say how it was finished ({first_problem(error)}): "
            "delete it and run again."
        ) from error


class FinishObjective:
    """Objective of finishing on batches of the calibration images.

    Attributes:
        starts: (terms,) float64 divisors of the terms.
    """

    def __init__(
        self,
        chain: BlockChain,
        samples: Samples,
        divergence: Divergence,
        *,
        teacher: BlockChain | None = None,
        resources: Resources = Resources(),
    ) -> None:
        """Run the full-precision model on all ``samples`` and leave `chain` quantized.

        ``teacher`` is that model; by default `chain` without quantizers.
        """
        self.chain, self.samples, self.divergence = chain, samples, divergence.sharp()
        self.device, model = next(chain.parameters()).device, chain if teacher is None else teacher
        storage = Storage(resources.placement, self.device, pinned=not samples.varying)
        outputs, features = Collected(storage, samples), Collected(storage, samples)
        set_quantized(model, False)
        with torch.no_grad():
            for rows in samples.slices(resources.batch_size):
                output, feature = output_and_feature(model, self._batch(samples, rows))
                outputs.put(rows, output.float())
                features.put(rows, feature.float())
        set_quantized(chain, True)
        self.features = features.samples
        self.reference = self.divergence.reference(outputs.samples)
        self.starts = torch.ones((), dtype=torch.float64, device=self.device)

    def terms(self, rows: Rows) -> Tensor:
        """Return the divergence's terms and, as the last one, the squared error, float64."""
        output, feature = output_and_feature(self.chain, self._batch(self.samples, rows))
        reference = self._batch(self.reference, rows)
        # At 8 bits the divergence is about 1e-8; in float32 it could be negative.
        far = self.divergence.terms(output.double(), reference.double()).double()
        error = (feature - self._batch(self.features, rows)).double().square().mean()
        return torch.cat([far, error[None]])

    def value(self, terms: Tensor) -> Tensor:
        """Return the objective, a scalar: the mean of the divergence's terms plus the error."""
        ratios = terms / self.starts
        return ratios[:-1].mean() + ratios[-1]

    def begin(self, numbers: range, size: int) -> float:
        """Make the mean terms over the samples ``numbers`` the start values; see :meth:`mean`.

        Raises NumericsError if one is NaN or infinite.
        """
        terms = self._mean_terms(numbers, size)
        if not terms.isfinite().all():
            raise NumericsError(
                "The outputs of the quantized model are NaN or infinite: nothing can be finished."
            )
        self.starts = torch.where(terms > 0, terms, torch.ones_like(terms))
        return float(self.value(terms))

    def mean(self, numbers: range, size: int) -> float:
        """Return the mean objective over consecutive samples, in batches of ``size``."""
        return float(self.value(self._mean_terms(numbers, size)))

    @torch.no_grad()
    def _mean_terms(self, numbers: range, size: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in numbers[::size]:
            rows = slice(first, min(first + size, numbers.stop))
            total = total + self.terms(rows) * (rows.stop - rows.start)
        return total / len(numbers)

    def _batch(self, samples: Samples, rows: Rows) -> Tensor:
        chosen = samples[rows] if isinstance(rows, slice) else samples.whole[rows]
        return chosen.to(self.device, non_blocking=True)


def output_and_feature(chain: BlockChain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and penultimate features (B, ...) of a chain for inputs ``x`` (B, ...).

    The feature is that of :attr:`.BlockChain.feature_end`, as in the loss ``glf``. In a chain
    without one it is the output.
    """
    side, end, feature = chain.side_of(x), chain.feature_end, None
    kept: Kept = ()
    for index, segment in enumerate(chain):
        if index == end:
            feature = segment.feature(x, side, kept)
        x = segment(x, side, kept)
        kept = segment.kept_with(x, kept)
    return x, x if feature is None else feature


def finishable(chain: BlockChain) -> bool:
    """Return True unless the chain has only predictors, which stay as calibrated."""
    return any(True for _ in _trained(chain))


def finish(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    divergence: Divergence,
    *,
    resources: Resources = Resources(),
    teacher: BlockChain | None = None,
) -> Finishing:
    """Finish a chain, in place; its codes must be decided.

    The last ``recipe.finish_held_out`` images are held out. A divergence that compares samples sets
    the size of batches. Images of varying shapes are taken one by one in their order.

    Args:
        images: (n, ...) calibration inputs of the chain, on any device.
        resources: settings of the run; progress has one unit per step.
        teacher: the full-precision model; by default ``chain`` without quantizers.

    Raises:
        RecipeError: there are too few images.
        NumericsError: the objective is NaN or infinite before the first step.
    """
    samples, device = Samples.of(images), next(chain.parameters()).device
    size = _batch_size(samples, recipe, divergence)
    count, steps = len(samples) - recipe.finish_held_out, recipe.finish_steps
    held_out = range(count, len(samples))
    objective = FinishObjective(chain, samples, divergence, teacher=teacher, resources=resources)
    affine, scales = trained_tensors(chain, recipe.finish_weight_scales)
    variables, floors = [*affine, *scales], [SCALE_FLOOR * scale.detach() for scale in scales]
    groups = [(affine, recipe.finish_lr), (scales, recipe.finish_lr_scale)]
    optimizer = torch.optim.Adam([{"params": own, "lr": rate} for own, rate in groups])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    measured = {math.ceil(steps * point / POINTS) for point in range(1, POINTS + 1)}
    with _prepared(chain, variables, recipe.finish_weight_scales):
        start = objective.begin(held_out, size)
        best, kept, state = start, 0, [value.detach().clone() for value in variables]
        for step, rows in enumerate(_batches(recipe, samples.varying, count, size), 1):
            _learn(chain, "fused")
            with torch.enable_grad(), arithmetic(recipe.step_dtype, device):
                loss = objective.value(objective.terms(rows))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            for scale, floor in zip(scales, floors, strict=True):
                scale.data.clamp_(min=floor)
            if step not in measured:
                continue
            _learn(chain, None)
            value = objective.mean(held_out, size)
            if value < best and not _refused(chain, recipe):
                best, kept, state = value, step, [value.detach().clone() for value in variables]
            if not math.isfinite(value):
                break
            resources.on_progress(Progress("finish", step, steps, loss=value))
        for variable, wanted in zip(variables, state, strict=True):
            variable.data.copy_(wanted)
    resources.on_progress(Progress("finish", steps, steps, loss=best))
    return Finishing(start=start, best=best, step=kept, steps=steps)


def trained_tensors(chain: BlockChain, weight_scales: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return what finishing trains: affine parameters of norms with all biases; and scales.

    A norm is any module with a weight of one dimension. ``weight_scales`` adds those of weights.
    """
    affine: list[Tensor] = []
    scales: list[Tensor] = []
    for module in _trained(chain):
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, ActivationQuantizer):
            if not module.off and (weight_scales or not isinstance(module, WeightQuantizer)):
                scales.append(module.scale)
        elif isinstance(module, WeightLayer) and module.quantized_bias.numel():
            affine.append(module.quantized_bias)
        else:
            values = [own[name] for name in ("weight", "bias") if name in own]
            affine += [value for value in values if value.ndim == 1]
    return list(dict.fromkeys(affine)), list(dict.fromkeys(scales))


def _trained(chain: BlockChain) -> Iterator[nn.Module]:
    """Yield all modules except those of predictors, which stay as calibrated."""
    for segment in chain:
        if segment.kind != "predictor":
            yield from segment.modules()


def _batch_size(samples: Samples, recipe: Recipe, divergence: Divergence) -> int:
    """Return the number of samples per batch. Raises RecipeError if there are too few samples."""
    held, count = recipe.finish_held_out, len(samples) - recipe.finish_held_out
    if count < held:
        raise RecipeError(
            f"{len(samples)} calibration images are fewer than twice the {held} that finishing "
            "holds out: lower finish_held_out or give more images."
        )
    if samples.varying:
        return 1
    if divergence.batch is not None:
        return min(divergence.batch, count)
    if count < recipe.finish_batch:
        raise RecipeError(
            f"Finishing trains on {count} images, fewer than a batch of {recipe.finish_batch}: "
            "lower finish_batch or give more images."
        )
    return recipe.finish_batch


def _batches(recipe: Recipe, varying: bool, count: int, size: int) -> Iterator[Rows]:
    """Yield the batch of each step from the first ``count`` samples."""
    if varying:
        yield from (slice(step % count, step % count + 1) for step in range(recipe.finish_steps))
    else:
        generator = block_generator(recipe.seed, "finish")
        yield from draw_batches(recipe.finish_steps, size, count, generator)


def _learn(chain: BlockChain, form: Form | None) -> None:
    """Give the activation quantizers straight-through gradients; None computes as in inference."""
    for module in chain.modules():
        if isinstance(module, ActivationQuantizer) and not isinstance(module, WeightQuantizer):
            module.learning = form


def _refused(chain: BlockChain, recipe: Recipe) -> bool:
    """Return True if a checkpoint with the present scales would be refused."""
    layers = quant_layers(chain)
    return any(layer.problem(recipe.range_search, True) is not None for _, layer in layers)


@contextmanager
def _prepared(chain: BlockChain, variables: list[Tensor], weight_scales: bool) -> Iterator[None]:
    """Make ``variables`` trainable; give layers constant rounded weights unless scales are."""
    floats: list[tuple[WeightLayer, nn.Parameter]] = []
    try:
        for layer in chain.modules() if not weight_scales else ():
            if isinstance(layer, WeightLayer):
                weight = layer._parameters["weight"]
                assert weight is not None
                floats.append((layer, weight))
                rounded = layer.weight_quantizer.quantized(weight.detach())
                layer.weight, layer.soft = nn.Parameter(rounded, requires_grad=False), True
        for variable in variables:
            variable.requires_grad_(True)
        yield
    finally:
        for layer, weight in floats:
            layer.weight, layer.soft = weight, False
        for variable in variables:
            variable.requires_grad_(False).grad = None
        _learn(chain, None)
