"""MLP reconstruction (APHQ-ViT: Wu et al., CVPR 2025, arXiv:2504.02508): ReLU in place of GELU.

A stage of its own before calibration. Each MLP with ReLU is trained by itself, on full-precision
inputs of the model with GELU, to give what it gave with GELU: its output error is weighted by the
average perturbation Hessian there, plus twice the same error with fc2's input clamped to a quantile
of its positive values. (The released code lists the norm before the MLP among what is trained; its
loss does not depend on it.)
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fimaq_core.calibration.thinning import spread
from fimaq_core.chain import BlockChain, MlpPart, Segment
from fimaq_core.errors import ModelError, NumericsError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import perturbation_hessian
from fimaq_core.layers import set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import OnProgress, Progress, losses_to, silent
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.schedule import block_generator, draw_batches
from fimaq_core.reconstruction.tape import Collected, Placement, Storage, Tape
from fimaq_core.samples import Samples

#: Weight of the term whose hidden values are clamped, as released.
_CLAMPED_WEIGHT = 2.0
#: Hidden values that the clamping quantile is taken of, at most: those of the first images; where
#: sizes vary, of all.
_VALUES = 2**24


@dataclass(frozen=True)
class _Lesson:
    """Training data of an MLP."""

    #: (n, ...) of the MLP
    inputs: Samples
    targets: Samples
    #: of one sample's shape, for all; where shapes vary each sample's; None without
    hessian: Samples | None
    limit: float  # the clamping value


def mlps(segments: Iterable[Segment]) -> nn.ModuleList:
    """All MLPs of ``segments`` (a chain, or several) in order: what an MLP reconstruction changes."""
    return nn.ModuleList(
        segment.block.get_submodule(part.name) for segment in segments for part in segment.mlps
    )


def use_relu(segments: Iterable[Segment]) -> None:
    """Replace the activation of every MLP of ``segments`` by ReLU, in place.

    Raises:
        ModelError: there is no MLP, or one with another activation than GELU.
    """
    segments = list(segments)
    if not len(mlps(segments)):
        raise ModelError(
            "The model has no MLP that its family names, so there is nothing for MLP reconstruction."
        )
    for segment in segments:
        for part in segment.mlps:
            mlp = segment.block.get_submodule(part.name)
            activation = mlp.get_submodule(part.act)
            if not isinstance(activation, part.gelu):
                raise ModelError(
                    f"{segment.label}.{part.name}: MLP reconstruction replaces GELU, not {type(activation).__name__}."
                )
            mlp.set_submodule(part.act, nn.ReLU())


def reconstruct_mlps(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    divergence: Divergence,
    *,
    on_progress: OnProgress = silent,
    placement: Placement = "device",
    batch_size: int = 32,
    restore: Callable[[int, nn.Module], bool] = lambda index, mlp: False,
    save: Callable[[int, nn.Module], None] = lambda index, mlp: None,
) -> BlockChain:
    """Reconstruct every MLP of an uncalibrated chain, in place; return a copy of what it was.

    Args:
        recipe: the ``mlp_*`` settings, temperature and seed.
        restore, save: called for each MLP, with its number.
        chain, images, divergence, on_progress, placement, batch_size: as in
            :func:`fimaq_core.reconstruction.reconstruct.reconstruct`.

    Raises:
        ModelError: no MLP with GELU.
        RecipeError: fewer images than a batch.
        NumericsError: a loss is NaN or infinite.
    """
    samples, device = Samples.of(images), next(chain.parameters()).device
    samples.check_batch(recipe.mlp_batch, "mlp_batch")
    teacher = copy.deepcopy(chain)
    use_relu(chain)
    for one in (chain, teacher):
        set_quantized(one, False)
    reference = divergence.reference(
        samples.map(lambda part: teacher(part.to(device)).float(), batch_size)
    )
    storage = Storage(placement, device, pinned=not samples.varying)
    tape = Tape(
        teacher,
        samples,
        storage,
        with_prefix=False,
        batch_size=batch_size,
        frozen_dtype=recipe.frozen_dtype,
    )
    begin, number = Progress("reconstruct MLPs", 0, len(mlps(chain)) * recipe.mlp_steps), 0
    for index, segment in enumerate(teacher):
        for part in segment.mlps:
            mlp = chain.segment(index).block.get_submodule(part.name)
            if not restore(number, mlp):
                begin = replace(
                    begin, done=number * recipe.mlp_steps, block=f"{segment.label}.{part.name}"
                )
                on_progress(begin)
                lesson = _prepare(tape, part, recipe, reference, divergence)
                advice = f"lower mlp_lr (now {recipe.mlp_lr})"
                tick = losses_to(on_progress, begin, recipe.mlp_steps, "the MLP's loss", advice)
                _train(mlp, part, lesson, recipe, begin.block, tick)
                save(number, mlp)
                del lesson  # before the next one is made
            number += 1
        if index + 1 < len(teacher):
            tape.advance()
    on_progress(Progress(begin.stage, begin.total, begin.total))
    return teacher


def _prepare(
    tape: Tape, part: MlpPart, recipe: Recipe, reference: Samples, divergence: Divergence
) -> _Lesson:
    """One sweep over the images with the present block of the tape."""
    device, full, segment = tape.storage.device, tape.full, tape.teacher.segment(tape.index)
    mlp, where = segment.block.get_submodule(part.name), f"{segment.label}.{part.name}"
    inputs, targets, hessians = (Collected(tape.storage, full) for _ in range(3))
    total: Tensor | None = None
    hidden: list[Tensor] = []
    seen: dict[str, Tensor] = {}
    handles = [
        mlp.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out)),
        mlp.get_submodule(part.fc2).register_forward_pre_hook(
            lambda module, args: seen.update(hidden=args[0])
        ),
    ]
    for rows in full.slices(divergence.batch or tape.batch_size):
        x = full[rows].to(device)
        with torch.no_grad(), arithmetic(recipe.frozen_dtype, device):
            segment.block(x)
        output, values = seen["y"].float(), seen["hidden"].float()
        inputs.put(rows, seen["x"].float())
        targets.put(rows, output)
        if full.varying:  # every image has its share, evenly spread over its tokens
            tokens = values.flatten(0, -2)
            share = max(_VALUES // (len(full) * tokens.shape[1]), 1)
            hidden.append(tokens[spread(len(tokens), share, device)].flatten())
        elif sum(one.numel() for one in hidden) < _VALUES:
            hidden.append(values.flatten())
        if recipe.mlp_loss == "perturb_mean":
            rest = _rest_behind(tape, mlp, x, rows)
            to, epsilon = reference[rows].to(device), recipe.perturbation
            own = perturbation_hessian(rest, output, to, divergence, epsilon, recipe.frozen_dtype)
            if full.varying:
                hessians.put(rows, _scaled(own, own.mean(), where))
            else:
                total = own.sum(0) if total is None else total + own.sum(0)
    for handle in handles:
        handle.remove()
    hessian = None
    if recipe.mlp_loss == "perturb_mean":
        hessian = (
            hessians.samples
            if total is None
            else Samples(_scaled(total, total.square().mean().sqrt(), where))
        )
    limit = positive_quantile(torch.cat(hidden)[:_VALUES], recipe.mlp_percentile)
    return _Lesson(inputs.samples, targets.samples, hessian, limit)


def _scaled(hessian: Tensor, size: Tensor, where: str) -> Tensor:
    """``hessian`` over its size. Raises NumericsError."""
    if not torch.isfinite(size):
        raise NumericsError(
            f"{where}: the perturbation Hessian is not finite: check the images and the weights."
        )
    if not size > 0:
        raise NumericsError(f"{where}: the perturbation Hessian is zero; use mlp_loss mse.")
    return hessian / size


def _rest_behind(tape: Tape, mlp: nn.Module, x: Tensor, rows: slice) -> Callable[[Tensor], Tensor]:
    """From the output of an MLP in the present block to the model's, for the block's input ``x``."""
    block, beside = (
        tape.teacher.segment(tape.index).block,
        tape.beside.rows(rows, tape.storage.device),
    )

    def rest(output: Tensor) -> Tensor:
        handle = mlp.register_forward_hook(lambda module, args, out: output)
        try:
            return tape.teacher.rest(tape.index, block(x), *beside)
        finally:
            handle.remove()

    return rest


def positive_quantile(values: Tensor, share: float) -> float:
    """The value that ``share`` of the positive ``values`` (n,) do not exceed; 0 if none is positive."""
    positive = values[values > 0]
    if not len(positive):
        return 0.0
    rank = max(-(-round(share * 1e9) * len(positive) // 10**9), 1)
    return float(positive.kthvalue(rank).values)


def mlp_loss(
    mlp: nn.Module, part: MlpPart, x: Tensor, target: Tensor, hessian: Tensor | None, limit: float
) -> Tensor:
    """``mean(H (z - t)²) + 2 mean(H (z' - t)²)``, z' the output with hidden values clamped.

    t are outputs with GELU (B, ...); H has one sample's shape, None for ones; ``limit`` bounds the
    clamped hidden values.
    """
    fc2 = mlp.get_submodule(part.fc2)
    hidden = mlp.get_submodule(part.act)(mlp.get_submodule(part.fc1)(x))
    errors = (fc2(hidden) - target).square() + _CLAMPED_WEIGHT * (
        fc2(hidden.clamp(max=limit)) - target
    ).square()
    loss: Tensor = (errors if hessian is None else errors * hessian).mean()
    return loss


def _train(
    mlp: nn.Module,
    part: MlpPart,
    lesson: _Lesson,
    recipe: Recipe,
    label: str,
    tick: Callable[[int, Tensor], None],
) -> None:
    device = next(mlp.parameters()).device
    wanted = [
        p
        for name in (part.fc1, part.fc2)
        for p in (mlp.get_submodule(name).weight, mlp.get_submodule(name).bias)
    ]
    parameters = [p for p in wanted if isinstance(p, nn.Parameter)]
    pick = _picker(lesson, recipe, label, device)
    optimizer = torch.optim.Adam(parameters, lr=recipe.mlp_lr, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.mlp_steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step in range(1, recipe.mlp_steps + 1):
            loss = mlp_loss(mlp, part, *pick(step - 1), lesson.limit)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            tick(step, loss.detach())
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _picker(
    lesson: _Lesson, recipe: Recipe, label: str, device: torch.device
) -> Callable[[int], tuple[Tensor, Tensor, Tensor | None]]:
    """Gives inputs, targets and Hessian of step ``number`` (from 0): a random batch, or one sample."""
    inputs, hessian = lesson.inputs, lesson.hessian
    drawn: Tensor | None = None
    if not inputs.varying:
        generator = block_generator(recipe.seed, f"{label}/mlp")
        drawn = draw_batches(recipe.mlp_steps, recipe.mlp_batch, len(inputs), generator).to(
            inputs.device
        )

    def pick(number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        def chosen(samples: Samples) -> Tensor:
            found = samples[number % len(inputs)] if drawn is None else samples.whole[drawn[number]]
            return found.to(device, non_blocking=True)

        shared = hessian if hessian is None or drawn is None else hessian.whole
        own = chosen(shared) if isinstance(shared, Samples) else shared
        return chosen(inputs), chosen(lesson.targets), own

    return pick
