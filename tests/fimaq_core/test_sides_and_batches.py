"""Chains with a side, and divergences that compare samples of a batch with each other."""

import pytest
import torch
from small_models import Measured, quick
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import Beside, BlockChain, MlpPart, NormPair, Segment
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import Sweep
from fimaq_core.layers import QuantLinear, set_quantized
from fimaq_core.pipeline import quantize_chain
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import mlp as mlp_module
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Storage, Tape
from fimaq_core.samples import Samples
from fimaq_core.store import Resources

CPU = torch.device("cpu")
TOKENS, WIDTH, WORDS, END = 6, 16, 20, 19


class Mlp(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.fc1 = QuantLinear.from_float(nn.Linear(WIDTH, 2 * WIDTH), recipe.w_bits, recipe.a_bits)
        self.act = nn.GELU()
        self.fc2 = QuantLinear.from_float(nn.Linear(2 * WIDTH, WIDTH), recipe.w_bits, recipe.a_bits)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Tokens see those before them by a running mean."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp(recipe)

    def forward(self, x: Tensor) -> Tensor:
        seen = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        out: Tensor = x + self.mlp(self.norm(seen))
        return out


class End(nn.Module):
    """Token ids (B, T) to the position of the end token (B,)."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids.argmax(1)


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, end: Tensor) -> Tensor:
        pooled: Tensor = self.norm(x)[torch.arange(len(x)), end]
        return pooled


def text_chain(recipe: Recipe, depth: int = 2) -> BlockChain:
    torch.manual_seed(0)
    segments = []
    for number in range(depth):
        block = Block(recipe)
        before = nn.Embedding(WORDS, WIDTH) if number == 0 else None
        pairs = (NormPair(block.norm, "mlp.fc1"),)
        segments.append(
            Segment(f"blocks.{number}", "block", block, before, pairs, (MlpPart("mlp"),))
        )
    projection = QuantLinear.from_float(
        nn.Linear(WIDTH, 8, bias=False), recipe.w_bits, recipe.a_bits
    )
    segments.append(Segment("proj", "projection", projection, before=Pool(), takes_side=True))
    return BlockChain(segments, side=End())


def captions(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, END, (count, TOKENS), generator=generator)
    ids[torch.arange(count), torch.randint(1, TOKENS, (count,), generator=generator)] = END
    return ids


def by_hand(chain: BlockChain, ids: Tensor) -> Tensor:
    """Outputs of the chain, caption by caption."""
    first, second, last = chain
    rows = []
    for one in ids:
        x = second.block(first.block(first.before(one[None])))
        rows.append(last.block(last.before.norm(x)[:, one.tolist().index(END)]))
    return torch.cat(rows)


def together(outputs: Tensor, reference: Tensor) -> Tensor:
    """A divergence in which the samples of a batch bear on each other."""
    return ((outputs @ outputs.T) - (reference @ reference.T)).square().mean()


def test_the_side_reaches_the_segment_that_takes_it() -> None:
    chain, ids = text_chain(quick()), captions(9)
    assert torch.allclose(chain(ids), by_hand(chain, ids), atol=1e-6)
    assert len(set(End()(ids).tolist())) > 2
    x = chain.segment(0)(ids)
    assert torch.allclose(chain.tail(1, x, chain.side_of(ids)), chain(ids), atol=1e-6)


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_the_tape_carries_the_side(placement: str) -> None:
    recipe = quick(w_bits=3, a_bits=3)
    chain, ids = text_chain(recipe), captions(10)
    calibrate(chain, ids, recipe, batch_size=4)
    set_quantized(chain, False)
    full = chain(ids)
    tape = Tape(chain, ids, Storage(placement, CPU), with_prefix=True, batch_size=4)
    assert tape.beside.side is not None
    assert torch.equal(tape.beside.side.whole, ids.argmax(1))
    tape.advance()
    tape.advance()
    target = tape.compute_target().whole
    assert torch.allclose(target, full, atol=1e-6)
    last = chain.segment(2)
    set_quantized(chain, True)
    expected = last.enter(chain.segment(1)(chain.segment(0)(ids)), tape.beside.side.whole)
    assert tape.prefix is not None
    assert torch.allclose(tape.prefix.whole, expected, atol=1e-6)
    assert not torch.allclose(tape.prefix.whole, tape.full.whole, atol=1e-2)


def test_calibration_sees_what_the_model_computes() -> None:
    recipe = quick(range_search="minmax", range_images=10)
    chain, ids = text_chain(recipe), captions(10)
    seen: list[Tensor] = []
    projection = chain.segment(2).block
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    chain(ids)
    handle.remove()
    calibrate(chain, ids, recipe, batch_size=4)
    scale = (seen[0].max() - seen[0].min()) / (2**recipe.a_bits - 1)
    assert float(projection.input_quantizer.scale) == pytest.approx(float(scale), rel=1e-5)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradients_go_through_the_side(index: int) -> None:
    chain, ids = text_chain(quick()), captions(8)
    divergence = Measured(together, batch=4)
    reference = chain(ids) + 0.1
    x = ids if index == 0 else chain.segment(0)(ids)
    x = chain.segment(1)(x) if index == 2 else x
    inputs = chain.segment(index).enter(x, chain.side_of(ids)).detach()
    beside = Beside(Samples(chain.side_of(ids)))
    sweep = Sweep(chain, index, Samples(reference), divergence, CPU, 4, beside=beside)
    for part, output, gradient in sweep.gradients(inputs):
        leaf = output.clone().requires_grad_(True)
        z = leaf if index == 2 else chain.tail(index + 1, leaf, ids[part].argmax(1))
        (expected,) = torch.autograd.grad(4 * together(z, reference[part]), leaf)
        assert torch.allclose(gradient, expected, atol=1e-6)
        assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize(
    "method", ["rtn", "brecq", "qdrop", "pdquant", "aphq", "fimaq", "fimaq-mlp", "lsvit"]
)
def test_every_method_quantizes_a_chain_with_a_side(method: str) -> None:
    recipe = (
        quick(method, mlp_steps=4, mlp_batch=8)
        if method in ("aphq", "fimaq-mlp")
        else quick(method)
    )
    chain, ids = text_chain(recipe), captions(24)
    full = chain(ids)
    log = quantize_chain(chain, ids, recipe, Measured(together, batch=6), Resources(batch_size=5))
    error = float((chain(ids) - full).norm() / full.norm())
    assert 0 < error < 0.5
    if recipe.reconstruct:
        assert list(log.last_loss) == ["blocks.0", "blocks.1", "proj"]


@pytest.mark.parametrize("loss", ["fisher_dplr", "least_squares", "perturb", "fisher_brecq"])
def test_passes_keep_to_the_batches_of_the_divergence(loss: str) -> None:
    """However many samples a pass takes otherwise, those of a batch come together and no others."""
    recipe = quick(loss=loss)
    chain, ids = text_chain(recipe), captions(10)
    calibrate(chain, ids, recipe)
    set_quantized(chain, False)
    seen: set[tuple[float, ...]] = set()

    def counting(outputs: Tensor, reference: Tensor) -> Tensor:
        seen.add(tuple(reference[:, 0].tolist()))
        return together(outputs, reference)

    marks = torch.arange(10.0)[:, None]
    tape = Tape(chain, ids, Storage("device", CPU), with_prefix=True, batch_size=3)
    tape.advance()
    tape.compute_target()
    reference = torch.cat([marks, chain(ids)[:, 1:]], dim=1)
    objective = BlockObjective(chain, tape, recipe, reference, Measured(counting, batch=4), [])
    set_quantized(chain.segment(1).block, True)
    if loss in ("fisher_dplr", "least_squares"):
        objective.update(chain.segment(1).block)
    assert seen == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)}


def test_the_mlps_hessian_keeps_to_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noting(rest: object, output: Tensor, *_: object) -> Tensor:
        sizes.append(len(output))
        return torch.ones_like(output)

    monkeypatch.setattr(mlp_module, "perturbation_hessian", noting)
    recipe = quick("aphq", mlp_steps=1, mlp_batch=4, calibration_images=10)
    divergence, resources = Measured(together, batch=4), Resources(batch_size=3)
    mlp_module.reconstruct_mlps(
        text_chain(recipe), captions(10), recipe, divergence, resources=resources
    )
    assert sizes == [4, 4, 2] * 2


def test_a_divergence_may_ask_for_more_than_outputs() -> None:
    """Columns that ``reference`` adds to a sample's outputs arrive with that sample."""
    rows: list[Tensor] = []
    ids = captions(24)

    class Wider(Divergence):
        batch = 8

        def reference(self, outputs: Samples) -> Samples:
            return Samples(
                torch.cat([outputs.whole, torch.arange(len(outputs))[:, None].float()], dim=1)
            )

        def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
            rows.append(reference[:, -1])
            return (outputs - reference[:, :-1]).square().sum(1).mean()

    recipe = quick("fimaq", fisher_k=1)
    quantize_chain(text_chain(recipe), ids, recipe, Wider())
    assert torch.equal(torch.cat(rows[:3]), torch.arange(24.0))
    assert len(rows) == 3 * 3
