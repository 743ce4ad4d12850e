"""MLP reconstruction (APHQ-ViT: Wu et al., CVPR 2025, arXiv:2504.02508): MLPs with ReLU learn to give what they gave with GELU.

A stage of its own before calibration. Each MLP is trained by itself on full-precision inputs of the model with GELU, for its
output error weighted by the average perturbation Hessian there, plus twice the same error with fc2's input clamped to a
quantile of its positive values. (The released code lists the norm before the MLP among what is trained; its loss does not
depend on it.)
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, MlpPart, Segment
from fimaq_core.errors import ModelError, NumericsError, RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import perturbation_hessian
from fimaq_core.layers import set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import Progress, Report, silent
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.schedule import block_generator, draw_batches
from fimaq_core.reconstruction.tape import Placement, Storage, Tape

#: Weight of the term whose hidden values are clamped, as released.
_CLAMPED_WEIGHT = 2.0
#: Hidden values that the clamping quantile is taken of, at most: those of the first images.
_VALUES = 2**24


@dataclass(frozen=True)
class _Samples:
    """What an MLP is trained on: inputs and outputs (n, ...), the Hessian (N,) or None, and the clamping value."""

    inputs: Tensor
    targets: Tensor
    hessian: Tensor | None
    limit: float


def mlps(segments: Iterable[Segment]) -> nn.ModuleList:
    """All MLPs of ``segments`` (a chain, or several) in order: what an MLP reconstruction changes."""
    return nn.ModuleList(segment.block.get_submodule(part.name) for segment in segments for part in segment.mlps)


def use_relu(segments: Iterable[Segment]) -> None:
    """Replace the activation of every MLP by ReLU, in place. ``segments``: a chain, or a list.

    Raises:
        ModelError: there is no MLP, or one with another activation than GELU.
    """
    segments = list(segments)
    if not len(mlps(segments)):
        raise ModelError("The model has no MLP that its family names, so there is nothing for MLP reconstruction.")
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
    images: Tensor,
    recipe: Recipe,
    divergence: Divergence,
    *,
    report: Report = silent,
    placement: Placement = "device",
    batch_size: int = 32,
    restore: Callable[[int, nn.Module], bool] = lambda index, mlp: False,
    save: Callable[[int, nn.Module], None] = lambda index, mlp: None,
) -> BlockChain:
    """Reconstruct every MLP of a chain that is not calibrated yet, in place; return a copy of what it was.

    Args:
        chain: on the device to use.
        images: (n, ...) inputs of the chain, the calibration images.
        recipe: the ``mlp_*`` settings, temperature and seed.
        divergence: of the task, behind the Hessian.
        report: receives progress, one unit a step.
        placement: where inputs and targets lie.
        batch_size: images a forward pass.
        restore: called for each MLP with its number first; loads a finished one and returns True, or returns False.
        save: called after each MLP that was trained.

    Raises:
        ModelError: no MLP with GELU.
        RecipeError: fewer images than a batch.
        NumericsError: a loss is no longer usable.
    """
    if images.shape[0] < recipe.mlp_batch:
        raise RecipeError(
            f"{images.shape[0]} calibration images are fewer than a batch of {recipe.mlp_batch}: "
            "lower mlp_batch or give more images."
        )
    teacher = copy.deepcopy(chain)
    use_relu(chain)
    for one in (chain, teacher):
        set_quantized(one, False)
    device = next(chain.parameters()).device
    with torch.no_grad():
        reference = torch.cat([teacher(part.to(device)).float() for part in torch.split(images, batch_size)])
    reference = divergence.reference(reference)
    storage = Storage(placement, device)
    tape = Tape(teacher, images, storage, with_prefix=False, batch_size=batch_size, frozen_dtype=recipe.frozen_dtype)
    total, number = len(mlps(chain)) * recipe.mlp_steps, 0
    for index, segment in enumerate(teacher):
        for part in segment.mlps:
            label = f"{segment.label}.{part.name}"
            mlp = chain.segment(index).block.get_submodule(part.name)
            start = number * recipe.mlp_steps

            def tick(step: int, loss: Tensor, start: int = start, label: str = label) -> None:
                # Reading the loss makes a GPU wait, so it happens rarely.
                if step % 50 == 0 or step == recipe.mlp_steps:
                    if not bool(torch.isfinite(loss)):
                        raise NumericsError(f"{label}: the MLP's loss is {float(loss)}; lower mlp_lr (now {recipe.mlp_lr}).")
                    report(Progress("reconstruct MLPs", start + step, total, label, f"loss {float(loss):.4g}"))

            if not restore(number, mlp):
                report(Progress("reconstruct MLPs", start, total, label))
                samples = _samples(teacher, tape, segment, part, recipe, reference, divergence)
                _train(mlp, part, samples, recipe, label, tick)
                save(number, mlp)
            number += 1
        if index + 1 < len(teacher):
            tape.advance()
    report(Progress("reconstruct MLPs", total, total))
    return teacher


def _samples(
    teacher: BlockChain,
    tape: Tape,
    segment: Segment,
    part: MlpPart,
    recipe: Recipe,
    reference: Tensor,
    divergence: Divergence,
) -> _Samples:
    """One sweep over the images: the MLP's inputs and outputs, the Hessian at its output, the clamping value."""
    device, block = tape.storage.device, segment.block
    mlp = block.get_submodule(part.name)
    inputs: Tensor | None = None
    targets: Tensor | None = None
    hessian: Tensor | None = None
    hidden: list[Tensor] = []
    seen: dict[str, Tensor] = {}
    handles = [
        mlp.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out)),
        mlp.get_submodule(part.fc2).register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0])),
    ]
    count = tape.full.shape[0]
    for rows in _slices(count, divergence.batch or tape.batch_size):
        x = tape.full[rows].to(device)
        with torch.no_grad(), arithmetic(recipe.frozen_dtype, device):
            block(x)
        found, made = seen["x"].float(), seen["y"].float()
        if inputs is None or targets is None:
            inputs = tape.storage.empty((count, *found.shape[1:]), torch.float32)
            targets = tape.storage.empty((count, *made.shape[1:]), torch.float32)
        inputs[rows].copy_(found)
        targets[rows].copy_(made)
        if sum(values.numel() for values in hidden) < _VALUES:
            hidden.append(seen["hidden"].float().flatten())
        if recipe.mlp_loss == "perturb_mean":
            side = None if tape.side is None else tape.side[rows]
            rest, to = _rest_behind(teacher, tape.index, mlp, x, side), reference[rows].to(device)
            own = perturbation_hessian(rest, made, to, divergence, recipe.perturbation, recipe.frozen_dtype).sum(0)
            hessian = own if hessian is None else hessian + own
    for handle in handles:
        handle.remove()
    assert inputs is not None
    assert targets is not None
    if hessian is not None:
        size = hessian.square().mean().sqrt()
        where = f"{segment.label}.{part.name}"
        if not torch.isfinite(size):
            raise NumericsError(f"{where}: the perturbation Hessian is not finite: check the images and the weights.")
        if not size > 0:
            raise NumericsError(f"{where}: the perturbation Hessian is zero; use mlp_loss mse.")
        hessian = hessian / size
    return _Samples(inputs, targets, hessian, positive_quantile(torch.cat(hidden)[:_VALUES], recipe.mlp_percentile))


def _rest_behind(teacher: BlockChain, index: int, mlp: nn.Module, x: Tensor, side: Tensor | None) -> Callable[[Tensor], Tensor]:
    """From the output of an MLP in block ``index`` to the model's, for the block's input ``x`` and the chain's side."""

    def rest(output: Tensor) -> Tensor:
        handle = mlp.register_forward_hook(lambda module, args, out: output)
        try:
            return teacher.tail(index + 1, teacher.segment(index).block(x), side)
        finally:
            handle.remove()

    return rest


def positive_quantile(values: Tensor, share: float) -> float:
    """The value that ``share`` of the positive ones among ``values`` (n,) do not exceed; 0 if none is positive."""
    positive = values[values > 0]
    if not len(positive):
        return 0.0
    rank = max(-(-round(share * 1e9) * len(positive) // 10**9), 1)
    return float(positive.kthvalue(rank).values)


def mlp_loss(mlp: nn.Module, part: MlpPart, x: Tensor, target: Tensor, hessian: Tensor | None, limit: float) -> Tensor:
    """``mean(H (z - t)²) + 2 mean(H (z' - t)²)``, z' the output with hidden values clamped to ``limit``; a scalar.

    Args:
        mlp, part: the MLP with ReLU; it computes ``fc2(act(fc1(x)))``.
        x: (B, ...) inputs.
        target: t, (B, ...) outputs with GELU.
        hessian: H, of one sample's shape; None for ones.
        limit: upper bound of the clamped hidden values.
    """
    fc2 = mlp.get_submodule(part.fc2)
    hidden = mlp.get_submodule(part.act)(mlp.get_submodule(part.fc1)(x))
    errors = (fc2(hidden) - target).square() + _CLAMPED_WEIGHT * (fc2(hidden.clamp(max=limit)) - target).square()
    loss: Tensor = (errors if hessian is None else errors * hessian).mean()
    return loss


def _train(
    mlp: nn.Module, part: MlpPart, samples: _Samples, recipe: Recipe, label: str, tick: Callable[[int, Tensor], None]
) -> None:
    device = next(mlp.parameters()).device
    wanted = [p for name in (part.fc1, part.fc2) for p in (mlp.get_submodule(name).weight, mlp.get_submodule(name).bias)]
    parameters = [p for p in wanted if isinstance(p, nn.Parameter)]
    generator = block_generator(recipe.seed, f"{label}/mlp")
    batches = draw_batches(recipe.mlp_steps, recipe.mlp_batch, len(samples.inputs), generator).to(samples.inputs.device)
    optimizer = torch.optim.Adam(parameters, lr=recipe.mlp_lr, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.mlp_steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step, batch in enumerate(batches, 1):
            x, target = (source[batch].to(device, non_blocking=True) for source in (samples.inputs, samples.targets))
            loss = mlp_loss(mlp, part, x, target, samples.hessian, samples.limit)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            tick(step, loss.detach())
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
