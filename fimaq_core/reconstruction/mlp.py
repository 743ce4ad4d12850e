"""MLP reconstruction (APHQ-ViT: Wu et al., CVPR 2025, arXiv:2504.02508): MLPs with ReLU learn to give what they gave with GELU.

A stage of its own before calibration. Each MLP is trained by itself on full-precision inputs of the model with GELU, for its
output error weighted by the average perturbation Hessian there, plus twice the same error with fc2's input clamped to a
quantile of its positive values. (The released code lists the norm before the MLP among what is trained; its loss does not
depend on it.)
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimaq_core.calibration.thinning import spread
from fimaq_core.chain import BlockChain, Kept, MlpPart, Segment
from fimaq_core.errors import ModelError, NumericsError, RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import perturbation_hessian
from fimaq_core.layers import set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import FEW_STEPS, Progress, Report, silent
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.schedule import block_generator, draw_batches
from fimaq_core.reconstruction.tape import Placement, Storage, Tape
from fimaq_core.samples import Ragged, Samples, batches, check_alone, joined, slices

#: Weight of the term whose hidden values are clamped, as released.
_CLAMPED_WEIGHT = 2.0
#: Hidden values that the clamping quantile is taken of, at most: those of the first images; where sizes vary, of all.
_VALUES = 2**24


@dataclass(frozen=True)
class _Samples:
    """What an MLP is trained on: inputs and outputs (n, ...), one Hessian for all of one sample's shape, or a Hessian a sample
    where shapes vary, or None, and the clamping value."""

    inputs: Samples
    targets: Samples
    hessian: Samples | None
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
    images: Samples,
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
        images: (n, ...) inputs of the chain, the calibration images; those of varying shapes are taken one by one in their order,
            each with a Hessian of its own.
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
    check_alone(images, recipe.mlp_batch, "mlp_batch")
    if len(images) < recipe.mlp_batch:
        raise RecipeError(
            f"{len(images)} calibration images are fewer than a batch of {recipe.mlp_batch}: lower mlp_batch or give more images."
        )
    teacher = copy.deepcopy(chain)
    use_relu(chain)
    for one in (chain, teacher):
        set_quantized(one, False)
    device = next(chain.parameters()).device
    with torch.no_grad():
        outputs = joined([teacher(part.to(device)).float() for part in batches(images, batch_size)], images)
    reference = divergence.reference(outputs)
    storage = Storage(placement, device, pinned=not isinstance(images, Ragged))
    tape = Tape(teacher, images, storage, with_prefix=False, batch_size=batch_size, frozen_dtype=recipe.frozen_dtype)
    total, number = len(mlps(chain)) * recipe.mlp_steps, 0
    for index, segment in enumerate(teacher):
        for part in segment.mlps:
            label = f"{segment.label}.{part.name}"
            mlp = chain.segment(index).block.get_submodule(part.name)
            start = number * recipe.mlp_steps

            def tick(step: int, loss: Tensor, start: int = start, label: str = label) -> None:
                # Reading the loss makes a GPU wait, so it happens rarely; see reconstruct().
                few = recipe.mlp_steps <= FEW_STEPS
                if step % 50 == 0 or step == recipe.mlp_steps or few:
                    if not bool(torch.isfinite(loss)):
                        raise NumericsError(f"{label}: the MLP's loss is {float(loss)}; lower mlp_lr (now {recipe.mlp_lr}).")
                    report(Progress("reconstruct MLPs", start + step, total, label, float(loss)))

            if not restore(number, mlp):
                report(Progress("reconstruct MLPs", start, total, label))
                samples = _samples(teacher, tape, segment, part, recipe, reference, divergence)
                _train(mlp, part, samples, recipe, label, tick)
                save(number, mlp)
                del samples  # before the next one's are made
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
    reference: Samples,
    divergence: Divergence,
) -> _Samples:
    """One sweep over the images: the MLP's inputs and outputs, the Hessian at its output, the clamping value."""
    device, block = tape.storage.device, segment.block
    mlp = block.get_submodule(part.name)
    apart, where, count = isinstance(tape.full, Ragged), f"{segment.label}.{part.name}", len(tape.full)
    inputs, targets = _Kept(tape), _Kept(tape)
    hessians: list[Tensor] = []
    hidden: list[Tensor] = []
    seen: dict[str, Tensor] = {}
    handles = [
        mlp.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out)),
        mlp.get_submodule(part.fc2).register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0])),
    ]
    for rows in slices(tape.full, divergence.batch or tape.batch_size):
        x = tape.full[rows].to(device)
        assert isinstance(x, Tensor)
        with torch.no_grad(), arithmetic(recipe.frozen_dtype, device):
            block(x)
        found, made = seen["x"].float(), seen["y"].float()
        inputs.put(rows, found)
        targets.put(rows, made)
        if apart:  # every image has its share, evenly spread over its tokens
            values = seen["hidden"].float().flatten(0, -2)
            hidden.append(values[spread(len(values), max(_VALUES // (count * values.shape[1]), 1), device)].flatten())
        elif sum(values.numel() for values in hidden) < _VALUES:
            hidden.append(seen["hidden"].float().flatten())
        if recipe.mlp_loss == "perturb_mean":
            to = reference[rows].to(device)
            assert isinstance(to, Tensor)
            rest = _rest_behind(teacher, tape.index, mlp, x, *tape.beside.rows(rows, device).tensors)
            own = perturbation_hessian(rest, made, to, divergence, recipe.perturbation, recipe.frozen_dtype)
            if apart:
                scaled = _scaled(own, own.mean(), where)
                hessians.append(tape.storage.empty(tuple(scaled.shape), torch.float32).copy_(scaled))
            else:
                hessians = [own.sum(0) if not hessians else hessians[0] + own.sum(0)]
    for handle in handles:
        handle.remove()
    hessian: Samples | None = None
    if hessians:
        hessian = Ragged(hessians) if apart else _scaled(hessians[0], hessians[0].square().mean().sqrt(), where)
    limit = positive_quantile(torch.cat(hidden)[:_VALUES], recipe.mlp_percentile)
    return _Samples(inputs.samples, targets.samples, hessian, limit)


class _Kept:
    """Batches of a sweep, where the tape lies; samples of the tape's kind."""

    def __init__(self, tape: Tape) -> None:
        self._tape, self._apart = tape, list[Tensor]()
        self._whole: Tensor | None = None

    def put(self, rows: slice, values: Tensor) -> None:
        """Keep ``values`` of the samples ``rows``, which come in order."""
        storage = self._tape.storage
        if isinstance(self._tape.full, Ragged):
            self._apart.append(storage.empty(tuple(values.shape), torch.float32).copy_(values))
            return
        if self._whole is None:
            self._whole = storage.empty((len(self._tape.full), *values.shape[1:]), torch.float32)
        self._whole[rows].copy_(values)

    @property
    def samples(self) -> Samples:
        """All of them."""
        return Ragged(self._apart) if self._whole is None else self._whole


def _scaled(hessian: Tensor, size: Tensor, where: str) -> Tensor:
    """``hessian`` over its size. Raises NumericsError."""
    if not torch.isfinite(size):
        raise NumericsError(f"{where}: the perturbation Hessian is not finite: check the images and the weights.")
    if not size > 0:
        raise NumericsError(f"{where}: the perturbation Hessian is zero; use mlp_loss mse.")
    return hessian / size


def _rest_behind(
    teacher: BlockChain, index: int, mlp: nn.Module, x: Tensor, side: Tensor | None, kept: Kept
) -> Callable[[Tensor], Tensor]:
    """From the output of an MLP in block ``index`` to the model's, for the block's input ``x`` and what travels beside it."""

    def rest(output: Tensor) -> Tensor:
        handle = mlp.register_forward_hook(lambda module, args, out: output)
        try:
            return teacher.rest(index, teacher.segment(index).block(x), side, kept)
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
    pick = _picker(samples, recipe, label, device)
    optimizer = torch.optim.Adam(parameters, lr=recipe.mlp_lr, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.mlp_steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step in range(1, recipe.mlp_steps + 1):
            loss = mlp_loss(mlp, part, *pick(step - 1), samples.limit)
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
    samples: _Samples, recipe: Recipe, label: str, device: torch.device
) -> Callable[[int], tuple[Tensor, Tensor, Tensor | None]]:
    """Gives inputs, targets and Hessian of step ``number`` (from 0): a random batch, or one sample after another."""
    inputs, targets, hessian = samples.inputs, samples.targets, samples.hessian
    if isinstance(inputs, Ragged):
        count, sources = len(inputs), [inputs, targets, hessian]

        def one(number: int) -> tuple[Tensor, Tensor, Tensor | None]:
            x, target, own = (None if s is None else s[number % count].to(device, non_blocking=True) for s in sources)
            assert isinstance(x, Tensor)
            assert isinstance(target, Tensor)
            assert own is None or isinstance(own, Tensor)
            return x, target, own

        return one
    assert isinstance(targets, Tensor)
    generator = block_generator(recipe.seed, f"{label}/mlp")
    drawn = draw_batches(recipe.mlp_steps, recipe.mlp_batch, len(inputs), generator).to(inputs.device)
    assert not isinstance(hessian, Ragged)
    return lambda number: (*(s[drawn[number]].to(device, non_blocking=True) for s in (inputs, targets)), hessian)  # type: ignore[return-value]
