"""MLP reconstruction (APHQ-ViT: Wu et al., CVPR 2025, arXiv:2504.02508): ReLU in place of GELU.

This stage runs before calibration. Each MLP with ReLU is trained alone, on its full-precision
inputs in the model with GELU, to give the same outputs as with GELU. The average perturbation
Hessian at the output weights the output error. A second term, with weight 2, is the same error with
fc2's input clamped to a quantile of its positive values. (The released code also lists the norm
before the MLP as trained, but the loss does not depend on the norm.)
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, MlpPart, Segment
from fimaq_core.checkpoint import Pieces
from fimaq_core.errors import ModelError, NumericsError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import Tail, perturbation_hessian
from fimaq_core.layers import set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import Progress, Tick, losses_to
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.schedule import block_generator, draw_batches
from fimaq_core.reconstruction.tape import Collected, Tape, start_walk
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples

#: Weight of the term with clamped hidden values, as released.
_CLAMPED_WEIGHT = 2.0


@dataclass(frozen=True)
class _TrainingData:
    """Training data of an MLP."""

    label: str  # name of the MLP in the original model
    inputs: Samples  # (n, ...) inputs of the MLP
    targets: Samples  # (n, ...) outputs with GELU
    #: one Hessian (...) for all samples, or one per sample if shapes vary; None for a plain loss
    hessian: Samples | None
    limit: float  # the clamping value


def mlps(segments: Iterable[Segment]) -> nn.ModuleList:
    """Return all MLPs of ``segments`` (of one or more chains) in order."""
    return nn.ModuleList(
        segment.block.get_submodule(part.name) for segment in segments for part in segment.mlps
    )


def use_relu(segments: Iterable[Segment]) -> None:
    """Replace the activation of every MLP of ``segments`` by ReLU, in place.

    Raises:
        ModelError: there is no MLP, or an MLP with another activation than GELU.
    """
    segments = list(segments)
    if not len(mlps(segments)):
        raise ModelError("MLP reconstruction finds nothing: the model's family names no MLP.")
    for segment in segments:
        for part in segment.mlps:
            mlp = segment.block.get_submodule(part.name)
            activation = mlp.get_submodule(part.act)
            if not isinstance(activation, part.gelu):
                raise ModelError(
                    f"{segment.label}.{part.name}: MLP reconstruction replaces GELU, "
                    f"not {type(activation).__name__}."
                )
            mlp.set_submodule(part.act, nn.ReLU())


def reconstruct_mlps(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    divergence: Divergence,
    *,
    resources: Resources = Resources(),
    pieces: Pieces = Pieces(),
) -> BlockChain:
    """Reconstruct every MLP of an uncalibrated chain, in place.

    Finished MLPs in ``pieces`` are loaded. Other arguments are as in
    :func:`fimaq_core.reconstruction.reconstruct.reconstruct`.

    Returns:
        A copy of the chain with GELU, the teacher.

    Raises:
        ModelError: there is no MLP with GELU.
        RecipeError: fewer images than a batch.
        NumericsError: a loss is NaN or infinite.
        CheckpointError: a finished MLP belongs to another run or is damaged.
    """
    samples = Samples.of(images)
    samples.check_batch(recipe.mlp_batch, "mlp_batch")
    teacher = copy.deepcopy(chain)
    use_relu(chain)
    for one in (chain, teacher):
        set_quantized(one, False)
    tape, reference = start_walk(teacher, samples, recipe, divergence, resources, with_prefix=False)
    steps, advice = recipe.mlp_steps, f"lower mlp_lr (now {recipe.mlp_lr})"
    begin, number = Progress("reconstruct MLPs", 0, len(mlps(chain)) * steps), 0
    for index, segment in enumerate(teacher):
        for part in segment.mlps:
            mlp = chain.segment(index).block.get_submodule(part.name)
            if pieces.load(number, mlp) is None:
                begin = replace(begin, done=number * steps, block=f"{segment.label}.{part.name}")
                resources.on_progress(begin)
                data = _prepare(tape, part, recipe, reference, divergence)
                tick = losses_to(resources.on_progress, begin, steps, "the MLP's loss", advice)
                _train(mlp, part, data, recipe, tick)
                pieces.save(number, mlp)
                del data  # frees memory before the next data are made
            number += 1
        if index + 1 < len(teacher):
            tape.advance()
    resources.on_progress(Progress(begin.stage, begin.total, begin.total))
    return teacher


def _prepare(
    tape: Tape, part: MlpPart, recipe: Recipe, reference: Samples, divergence: Divergence
) -> _TrainingData:
    """Make the training data of an MLP in one sweep over the images."""
    device, full, segment = tape.storage.device, tape.full, tape.teacher.segment(tape.index)
    mlp, where = segment.block.get_submodule(part.name), f"{segment.label}.{part.name}"
    inputs, targets, hessians = (Collected(tape.storage, full) for _ in range(3))
    total: Tensor | None = None
    seen: dict[str, Tensor] = {}
    handle = mlp.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    slices = list(full.slices(divergence.batch or tape.batch_size))
    for rows in slices:
        x = full[rows].to(device)
        with torch.no_grad(), arithmetic(recipe.frozen_dtype, device):
            segment.block(x)
        output = seen["y"].float()
        inputs.put(rows, seen["x"].float())
        targets.put(rows, output)
        if recipe.mlp_loss == "perturb_mean":
            run, to = _rest_behind(tape, mlp, x, rows), reference[rows].to(device)
            tail = Tail(run, to, divergence, recipe.frozen_dtype)
            own = perturbation_hessian(tail, output, recipe.perturbation)
            if full.varying:
                hessians.put(rows, _scaled(own, own.mean(), where))
            else:
                total = own.sum(0) if total is None else total + own.sum(0)
    handle.remove()
    hessian = None
    if total is not None:
        hessian = Samples(_scaled(total, total.square().mean().sqrt(), where))
    elif recipe.mlp_loss == "perturb_mean":
        hessian = hessians.samples
    kept = inputs.samples

    def hidden() -> Iterator[Tensor]:
        for rows in slices:
            with torch.no_grad(), arithmetic(recipe.frozen_dtype, device):
                yield _hidden(mlp, part, kept[rows].to(device)).float()

    limit = positive_quantile(hidden, recipe.mlp_percentile)
    return _TrainingData(where, kept, targets.samples, hessian, limit)


def _scaled(hessian: Tensor, size: Tensor, where: str) -> Tensor:
    """Return ``hessian / size``. Raises NumericsError if the size is zero or not finite."""
    problem = f"{where}: the perturbation Hessian is "
    if not torch.isfinite(size):
        raise NumericsError(f"{problem}not finite: check the images and the weights.")
    if not size > 0:
        raise NumericsError(f"{problem}zero; use mlp_loss mse.")
    return hessian / size


def _rest_behind(tape: Tape, mlp: nn.Module, x: Tensor, rows: slice) -> Callable[[Tensor], Tensor]:
    """Return a function from an MLP's output to the model's; ``x`` are the block's inputs."""
    block = tape.teacher.segment(tape.index).block
    beside = tape.beside.rows(rows, tape.storage.device)

    def rest(output: Tensor) -> Tensor:
        handle = mlp.register_forward_hook(lambda module, args, out: output)
        try:
            return tape.teacher.rest(tape.index, block(x), *beside)
        finally:
            handle.remove()

    return rest


def positive_quantile(pieces: Callable[[], Iterable[Tensor]], share: float) -> float:
    """Return the quantile of the positive values of all pieces at ``share``; 0 if there is none.

    The quantile is exact: it is the value of rank ``ceil(share n)`` among n positive values. Bits
    of positive float32 numbers, read as integers, have the same order. So the first of two passes
    counts the values by the upper half of their bits. The second pass counts those with the upper
    half of the quantile by the lower half. Memory: one piece and its bits, and 2^16 counts.

    Args:
        pieces: called once per pass; yields the same float32 tensors of any shape each time.
    """

    def positive() -> Iterator[Tensor]:
        for piece in pieces():
            yield piece[piece > 0].view(torch.int32)

    upper = reduce(torch.add, (torch.bincount(bits >> 16, minlength=2**15) for bits in positive()))
    count = int(upper.sum())
    if not count:
        return 0.0
    rank = max(-(-round(share * 1e9) * count // 10**9), 1)
    high = int(torch.searchsorted(upper.cumsum(0), rank))
    inside = (bits[bits >> 16 == high] & 0xFFFF for bits in positive())
    lower = reduce(torch.add, (torch.bincount(bits, minlength=2**16) for bits in inside))
    low = int(torch.searchsorted(lower.cumsum(0), rank - int(upper[:high].sum())))
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _hidden(mlp: nn.Module, part: MlpPart, x: Tensor) -> Tensor:
    """Return the input of an MLP's second linear layer, for inputs ``x`` (B, ...) of the MLP."""
    hidden: Tensor = mlp.get_submodule(part.act)(mlp.get_submodule(part.fc1)(x))
    return hidden


def mlp_loss(
    mlp: nn.Module, part: MlpPart, x: Tensor, target: Tensor, hessian: Tensor | None, limit: float
) -> Tensor:
    """Return ``mean(H (z - t)²) + 2 mean(H (z' - t)²)`` for the outputs z of an MLP with ReLU.

    z' are the outputs with hidden values clamped to ``limit``; ``target`` t (B, ...) the outputs
    with GELU. ``hessian`` H has the shape of one sample; None stands for ones.
    """
    fc2, hidden = mlp.get_submodule(part.fc2), _hidden(mlp, part, x)
    clamped = (fc2(hidden.clamp(max=limit)) - target).square()
    errors = (fc2(hidden) - target).square() + _CLAMPED_WEIGHT * clamped
    loss: Tensor = (errors if hessian is None else errors * hessian).mean()
    return loss


def _train(mlp: nn.Module, part: MlpPart, data: _TrainingData, recipe: Recipe, tick: Tick) -> None:
    device = next(mlp.parameters()).device
    layers = [mlp.get_submodule(name) for name in (part.fc1, part.fc2)]
    wanted = [value for layer in layers for value in (layer.weight, layer.bias)]
    parameters = [value for value in wanted if isinstance(value, nn.Parameter)]
    optimizer = torch.optim.Adam(parameters, lr=recipe.mlp_lr, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.mlp_steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step, batch in enumerate(_batches(data, recipe, device), 1):
            loss = mlp_loss(mlp, part, *batch, data.limit)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            tick(step, loss.detach())
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _batches(
    data: _TrainingData, recipe: Recipe, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield inputs, targets and Hessian of each step: a random batch.

    If shapes vary, each batch is one sample, in order and repeatedly.
    """
    inputs, targets, hessian = data.inputs, data.targets, data.hessian
    if inputs.varying:
        for step in range(recipe.mlp_steps):
            number = step % len(inputs)
            own = None if hessian is None else hessian[number].to(device, non_blocking=True)
            yield inputs[number].to(device), targets[number].to(device), own
        return
    generator = block_generator(recipe.seed, f"{data.label}/mlp")
    drawn = draw_batches(recipe.mlp_steps, recipe.mlp_batch, len(inputs), generator)
    own = None if hessian is None else hessian.whole
    for rows in drawn.to(inputs.device):
        x, target = inputs.whole[rows], targets.whole[rows]
        yield x.to(device, non_blocking=True), target.to(device, non_blocking=True), own
