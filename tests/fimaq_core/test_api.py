"""Quantization from a notebook: the model stays as it is, own modules are understood."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import deit, images, randomise, swin, vit
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

from fimaq_core import load, quantize
from fimaq_core.api import QuantizedModel
from fimaq_core.checkpoint import read_header, save_checkpoint
from fimaq_core.errors import CheckpointError, DataError, FimaqError, ModelError, RecipeError
from fimaq_core.families.own import names_of, own_chain
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.pipeline import quantize_chain
from fimaq_core.progress import silent
from fimaq_core.quantizers.special import AdaLogQuantizer
from fimaq_core.recipe import make_recipe
from fimaq_core.reconstruction.engines import EngineChoice
from fimaq_core.store import Resources
from tasks.classification.task import TASK
from tasks.common.cell.stages import calibrate_stage, reconstruct_stage
from tasks.common.request import CellRequest, DataRequest, ModelRequest

#: Settings for tenths of a second.
FEW: dict[str, Any] = {
    **{
        "range_candidates": 32,
        "range_rounds": 1,
        "steps": 4,
        "fisher_k": 2,
        "lr_alpha": 0.05,
        "lr_scale": 1e-3,
    },
    **{"mlp_steps": 2, "progress": False},
}


class Block(nn.Module):
    """A transformer block written by hand; ``attention`` selects the form of its attention."""

    def __init__(self, width: int, attention: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.drop = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            nn.Dropout(0.1),
        )
        self.attention = attention

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.attention == "function":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = q @ k.transpose(-2, -1) * (width // 2) ** -0.5
            scores = scores if bias is None else scores + bias
            out = self.drop(scores.softmax(-1)) @ v
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x)))))


class Net(nn.Module):
    """A small transformer written by hand, for 32 x 32 images."""

    def __init__(self, attention: str = "function", depth: int = 2, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.bias = nn.Parameter(torch.zeros(1, 1, 16, 16))
        self.blocks = nn.ModuleList([Block(width, attention) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, bias=self.bias)
        return self.head(self.norm(x).mean(1))


def net(attention: str = "function", depth: int = 2) -> nn.Module:
    return randomise(Net(attention, depth))


def torchvision_vit() -> nn.Module:
    """torchvision's ViT, whose attention is ``nn.MultiheadAttention``."""
    sizes = {"hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    return randomise(TorchvisionTransformer(32, 8, num_layers=2, num_heads=2, **sizes))


class Encoder(nn.Module):
    """A classifier around PyTorch's own ``nn.TransformerEncoder``."""

    def __init__(self) -> None:
        super().__init__()
        form = {"batch_first": True, "norm_first": True, "activation": "gelu"}
        layer = nn.TransformerEncoderLayer(32, 2, 64, **form)
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def parts(model: nn.Module) -> dict[str, Any]:
    """Arguments that name the parts of a custom module; none for timm's models."""
    if isinstance(model, TorchvisionTransformer):
        return {"blocks": model.encoder.layers, "head": model.heads}
    if isinstance(model, Encoder):
        return {"blocks": model.encoder.layers, "head": model.head}
    return {"blocks": model.blocks, "head": model.head} if isinstance(model, Net) else {}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": vit,
    "timm deit": deit,
    "timm swin": lambda: swin(32),
    "torchvision vit": torchvision_vit,
    "attention by function": net,
    "attention by products": lambda: net("products"),
    "torch encoder": lambda: randomise(Encoder()),
}


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_and_the_file_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model, x = MODELS[name](), images(16)
    model.train()
    model.get_submodule("head" if name != "torchvision vit" else "heads").eval()
    before, modes = bits_of(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    structure, wanted = repr(model), [value.requires_grad for value in model.parameters()]
    q = quantize(model, x, **FEW, **parts(model))
    q.save(tmp_path / "q.safetensors")
    again = load(tmp_path / "q.safetensors", model, **parts(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (repr(model), [value.requires_grad for value in model.parameters()]) == (
        structure,
        wanted,
    )
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        expected = model.eval()(x)
    assert torch.equal(q(x), again(x))
    assert torch.equal(q(x), copy.deepcopy(q)(x))
    error = float((q(x) - expected).norm() / expected.norm())
    assert 0.01 < error < 0.6
    assert (again.log, again.recipe, again.notes) == (q.log, q.recipe, q.notes)
    assert list(q.log.last_loss) == [segment.label for segment in q.chain]
    set_quantized(q, False)
    assert torch.allclose(q(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


SAVED = ("rtn", "adalog", "repq", "erq", "ptq4vit", "fimaq-mlp", "mlp-recon")


@pytest.mark.parametrize("method", SAVED)
def test_every_kind_of_method_can_be_saved(method: str, tmp_path: Path) -> None:
    model, x = vit(1), images(16)
    q = quantize(model, x, method=method, **FEW)
    q.save(tmp_path / "q.safetensors")
    assert torch.equal(q(x), load(tmp_path / "q.safetensors", model)(x))


def test_equals_the_stages_of_the_command_line(tmp_path: Path) -> None:
    settings = {
        **{name: value for name, value in FEW.items() if name not in ("progress", "mlp_steps")},
        **{"calibration_images": 48, "range_images": 16, "w_bits": 3, "a_bits": 4},
    }
    recipe, demo, data = make_recipe("fimaq", settings), ModelRequest("demo_vit"), DataRequest()
    calibrated, reconstructed = (
        tmp_path / "calibrated.safetensors",
        tmp_path / "reconstructed.safetensors",
    )
    request = CellRequest("classification", demo, data, recipe, eval_batch=32)
    calibrate_stage(request, calibrated, silent)
    reconstruct_stage(request, calibrated, reconstructed, {}, silent)
    loaded = TASK.load(demo)
    x = TASK.calibration(loaded, data, recipe).images
    q = quantize(loaded.model, x, **settings, progress=False)
    expected, found = load_file(reconstructed), q.chain.state_dict()
    assert q.recipe == recipe
    assert not q.log.notes
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_fimaq_is_better_than_rounding_to_nearest() -> None:
    loaded = TASK.load(ModelRequest("demo_vit"))
    settings = {**FEW, "steps": 40, "w_bits": 3, "a_bits": 3, "range_images": 16}
    recipe = make_recipe("fimaq", {"calibration_images": 448, "calibration_transform": "eval"})
    x = TASK.calibration(loaded, DataRequest(), recipe).images
    with torch.no_grad():
        expected = loaded.model(x[64:]).argmax(1)
    agree = {}
    for method in ("fimaq", "rtn"):
        q = quantize(loaded.model, x[:64], method=method, **settings)
        agree[method] = float((q(x[64:]).argmax(1) == expected).float().mean())
    assert agree["fimaq"] > agree["rtn"] + 0.1
    assert agree["fimaq"] > 0.75


def test_batches_are_taken_until_there_are_enough() -> None:
    x, taken = images(24), []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 24, 8):
            taken.append(start)
            yield x[start : start + 8], torch.zeros(8)

    model = vit(1)
    few = {**FEW, "method": "rtn", "calibration_images": 12, "range_images": 12}
    assert torch.equal(quantize(model, batches(), **few)(x), quantize(model, x, **few)(x))
    assert taken == [0, 8]
    singles = [(image, 3) for image in x]  # a data set
    assert torch.equal(quantize(model, singles, **few)(x), quantize(model, x, **few)(x))


def test_numbers_of_images_are_lowered_and_a_note_says_so() -> None:
    q = quantize(vit(1), images(20), **FEW)
    assert q.notes == [
        "There are 20 calibration images, so these were lowered: calibration_images 20 instead of "
        "1024, range_images 20 instead of 128, batch_size 20 instead of 32."
    ]
    assert (q.recipe.batch_size, q.recipe.mlp_batch, q.recipe.divergence_batch) == (20, 20, 20)
    few = {**FEW, "calibration_images": 20, "range_images": 10, "batch_size": 10}
    assert quantize(vit(1), images(20), **few).notes == []


def test_a_module_of_ones_own_is_quantized_as_its_family_would_be() -> None:
    """timm's ViT by its blocks: equal ranges, pairs and places of special quantizers."""
    for method in ("fimaq", "adalog", "repq"):
        model, x = vit(2), images(16)
        settings = {**FEW, "method": method, "reconstruct": False}
        settings["range_inputs"] = "float"  # the family also quantizes what is before the blocks
        known = quantize(model, x, **settings)
        own = quantize(model, x, **settings, blocks=model.blocks, head=model.head)
        for label in ("blocks.0", "blocks.1"):
            a, b = ({s.label: s.block for s in q.chain}[label] for q in (known, own))
            layers, products = dict(quant_layers(a)), []
            for name in [name for name, layer in layers.items() if isinstance(layer, QuantMatMul)]:
                products.append(layers.pop(name))
            theirs = {name.removeprefix("module."): layer for name, layer in quant_layers(b)}
            assert layers.keys() == theirs.keys() - {"products.0", "products.1"}
            pairs = [(layer, theirs[name]) for name, layer in layers.items()]
            pairs += list(zip(products, (theirs["products.0"], theirs["products.1"]), strict=True))
            for layer, other in pairs:
                expected, found = layer.state_dict(), other.state_dict()
                assert expected.keys() == found.keys()
                for name, tensor in expected.items():
                    a, b = found[name].float(), tensor.float()
                    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (label, name)


def test_both_ways_of_writing_attention_are_quantized_alike() -> None:
    x = images(16)
    models = [net("function"), net("products")]
    settings = {**FEW, "reconstruct": False}
    states = [quantize(model, x, **settings, **parts(model)).state_dict() for model in models]
    scales = [[state[name] for name in state if name.endswith("scale")] for state in states]
    assert len(scales[0]) == 2 * (2 * 4 + 2 * 2) + 2
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*scales, strict=True))


@pytest.mark.parametrize(
    ("build", "engine"),
    [
        (torchvision_vit, "eager"),
        (lambda: net("products"), "eager"),
        pytest.param(lambda: net(depth=1), "compiled", marks=pytest.mark.slow),
    ],
    ids=["multihead", "products", "compiled"],
)
def test_step_engines_agree_on_own_modules(
    build: Callable[[], nn.Module], engine: EngineChoice
) -> None:
    model, x = build(), images(16)
    settings = {key: value for key, value in FEW.items() if key != "progress"}
    recipe = make_recipe("fimaq", settings, {"batch_size": 8, "reconstruct_parts": "blocks"})
    own = parts(model)
    labels = names_of(model, [*own["blocks"], own["head"]], "parts")
    losses = []
    for choice in ("fused", engine):
        twin = copy.deepcopy(model).requires_grad_(False)
        chain = own_chain(twin, labels, x[:3], recipe)
        log = quantize_chain(chain, x, recipe, ClassifierDivergence(20.0), Resources(engine=choice))
        losses.append(log.last_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class Named(Net):
    """Its output is an object with logits, as Hugging Face's models have it."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x))


def test_outputs_with_logits_are_understood() -> None:
    model, x = randomise(Named()), images(8)
    q = quantize(model, x, method="rtn", w_bits=8, a_bits=8, progress=False, **parts(model))
    with torch.no_grad():
        expected = model(x).logits
    assert float((q(x) - expected).norm() / expected.norm()) < 0.05


def test_layers_of_own_modules_are_swapped_by_type() -> None:
    model = torchvision_vit()
    q = quantize(model, images(16), method="adalog", **FEW, **parts(model))
    kinds = [type(layer) for _, layer in quant_layers(q)]
    assert (kinds.count(QuantLinear), kinds.count(QuantMatMul), kinds.count(QuantConv2d)) == (
        2 * 4 + 1,
        4,
        0,
    )
    behind = {
        name
        for name, layer in quant_layers(q)
        if isinstance(layer, QuantLinear) and isinstance(layer.input_quantizer, AdaLogQuantizer)
    }
    assert behind == {f"chain.segments.{place}.block.module.mlp.3" for place in (0, 1)}
    assert [[pair.linear for pair in segment.pairs] for segment in q.chain] == [
        ["module.self_attention.qkv", "module.mlp.0"],
        ["module.self_attention.qkv", "module.mlp.0"],
        [],
    ]
    blocks = [segment.block for segment in q.chain]
    assert not [one for block in blocks for one in block.modules() if type(one) is nn.Linear]


class Skips(Net):
    """The stem leads around the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + start).mean(1))


class Between(Net):
    """Something lies between two blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks[1](2 * self.blocks[0](x)).mean(1))


class Varying(Net):
    """A block's second argument depends on the images."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, bias=x.mean().expand(1, 1, 16, 16))
        return self.head(x.mean(1))


class Ends(Net):
    """Something follows the head."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Twice(Net):
    """A block is applied twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks[1](self.blocks[0](self.blocks[0](x))).mean(1))


class Weights(nn.Module):
    """A block that multiplies by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(32))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x @ self.weight


class Reads(nn.Module):
    """A block that reads a layer's weight and does not call the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


def with_block(block: nn.Module) -> Net:
    model = Net()
    model.blocks[1] = block
    return model


OWN: dict[str, tuple[Callable[[], Net], str]] = {
    "a way around": (lambda: Skips(), r"do not give the model's output"),
    "something between": (lambda: Between(), r"input of blocks\.1 is not the output of blocks\.0"),
    "other arguments": (
        lambda: Varying(),
        r"blocks\.0 is called with another argument 'bias' for each batch",
    ),
    "something behind": (lambda: Ends(), r"nothing may follow the head"),
    "twice": (lambda: Twice(), r"calls blocks\.0 2 times"),
    "weights": (
        lambda: with_block(Weights()),
        r"blocks\.1 calls matmul with the parameter blocks\.1\.weight",
    ),
    "a weight read": (lambda: with_block(Reads()), r"blocks\.1 does not call fc itself"),
    "nothing to quantize": (lambda: with_block(_Nothing()), r"blocks\.1 \(_Nothing\) has no layer"),
}


class _Nothing(nn.Module):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x.relu()


@pytest.mark.parametrize("name", OWN)
def test_own_modules_that_cannot_be_quantized(name: str) -> None:
    build, message = OWN[name]
    model = build()
    randomise(model)
    with pytest.raises(ModelError, match=message):
        quantize(model, images(8), **FEW, blocks=model.blocks, head=model.head)


MISTAKES: dict[str, tuple[Callable[[], object], type[FimaqError], str]] = {
    "setting": (
        lambda: quantize(vit(1), images(8), stepps=4),
        RecipeError,
        r"'stepps'.*Did you mean 'steps'\?",
    ),
    "method": (
        lambda: quantize(vit(1), images(8), method="fimac"),
        RecipeError,
        r"Did you mean 'fimaq'\?",
    ),
    "family": (
        lambda: quantize(nn.Linear(2, 2), images(8)),
        ModelError,
        r"no model family knows.*blocks= and head=",
    ),
    "half": (
        lambda: quantize(net(), images(8), head=nn.Linear(2, 2)),
        ModelError,
        "Give both blocks= and",
    ),
    "foreign": (
        lambda: quantize(net(), images(8), blocks=net().blocks, head=nn.Linear(2, 2)),
        ModelError,
        r"blocks= must be modules inside the model, and number 0 \(Block\)",
    ),
    "no images": (lambda: quantize(vit(1), []), DataError, r"no calibration images"),
    "bytes": (
        lambda: quantize(vit(1), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)),
        DataError,
        r"not a torch\.uint8",
    ),
    "dictionary": (lambda: quantize(vit(1), [{"image": images(2)}]), DataError, r"not a dict"),
    "size": (
        lambda: quantize(vit(1), images(8, 40)),
        DataError,
        r"does not take images of shape \(3, 40, 40\)",
    ),
    "two sizes": (
        lambda: quantize(vit(1), [images(2), images(2, 40)]),
        DataError,
        r"transform them to one size",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_message(name: str) -> None:
    call, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_file_is_refused_for_another_model(tmp_path: Path) -> None:
    path, model = tmp_path / "q.safetensors", net()
    quantize(model, images(8), method="rtn", **FEW, **parts(model)).save(path)
    with pytest.raises(CheckpointError, match=r"made from other weights.*Give the float model"):
        load(path, randomise(Net(), seed=1))
    with pytest.raises(CheckpointError, match=r"made of another model"):
        load(path, vit(1))
    with pytest.raises(CheckpointError, match=r"another head: give blocks\.0, blocks\.1, head"):
        load(path, model, blocks=model.blocks[:1], head=model.head)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint"):
        load(tmp_path / "missing.safetensors", model)


def test_imports_are_light() -> None:
    """The package imports no PyTorch, its functions no model library."""
    code = "import sys, fimaq_core; print('torch' in sys.modules); "
    code += "from fimaq_core import quantize; print('torch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    for name in ("timm vit", "torchvision vit"):
        model, x = MODELS[name](), images(16)
        q = quantize(model, x, device="cuda", **{**FEW, "steps": 12}, **parts(model))
        assert q.log.engine == "graph"
        assert next(model.parameters()).device.type == "cpu"
        assert isinstance(q, QuantizedModel)
        found = q(x.cuda()).cpu()
        assert torch.allclose(found, q.cpu()(x), atol=0.3 * float(found.abs().max()))


def changed(path: Path, facts: dict[str, object], **tensors: Tensor) -> None:
    """Change facts of a saved model, and tensors by the end of their name."""
    mark, before = read_header(path)
    state = load_file(path)
    for end, tensor in tensors.items():
        name = next(key for key in state if key.endswith(end.replace("__", ".")))
        state[name] = tensor
    save_checkpoint(path, state, mark, {**before, **facts})


def test_a_file_of_someone_else_is_bounded_and_fits(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    q = quantize(vit(), images(4), method="fimaq", **FEW)
    for facts, tensors, message in (
        ({"shape": [3, 10**6, 10**6]}, {}, "a sample has over 16777216 values"),
        ({"shape": [3] * 10}, {}, "at most 3 items"),
        ({"shape": [10**4000, 1]}, {}, "a sample has over"),
        ({"stage": "calibrated"}, {}, "holds no quantized model"),
        ({}, {"qkv__input_quantizer__scale": torch.ones(1, 5, 1)}, "ranges that do not fit"),
    ):
        q.save(path)
        changed(path, facts, **tensors)
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path, vit())
        assert str(caught.value).isprintable()
