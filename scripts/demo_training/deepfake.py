"""Training of the demo model for tampered frames, on scenes of digits."""

from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training import common
from tasks.deepfake.demo.models import DEMO
from tasks.deepfake.demo.scenes import demo_frames, eval_transform
from tasks.deepfake.metrics import measures

VERSIONS = {"timm": timm.__version__}
SETTINGS = dict.fromkeys(DEMO.names, common.settings(epochs=16, lr=1e-3))


def fingerprint(part: str) -> str:
    """Return the fingerprint of a part of the data."""
    return demo_frames(part).source.fingerprint


def _inputs(part: str) -> tuple[Tensor, Tensor]:
    source, transform = demo_frames(part).source, eval_transform()
    images = torch.stack([transform(source.read(place)) for place in range(len(source.ids))])
    return images, torch.tensor(source.targets)


@torch.inference_mode()
def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """Return the ROC areas of frames and videos of a part in percent."""
    model.eval()
    images, labels = _inputs(part)
    fake = torch.cat([model(batch).softmax(1)[:, 1] for batch in images.split(250)])
    found = measures(fake.double().numpy(), labels.numpy() == 1, np.array(demo_frames(part).video))
    return {f"{part}_{name}": round(found[name].value, 4) for name in ("frame_auc", "video_auc")}


def train(name: str, settings: common.Settings) -> nn.Module:
    """Train a demo model from scratch and return it in eval mode."""
    model = common.start(DEMO, name, settings["seed"])
    common.widen(model)
    images, labels = _inputs("train")

    def draw(rng: np.random.Generator) -> common.BatchLoss:
        order = torch.from_numpy(rng.permutation(len(labels)))
        flips = rng.random((2, len(labels))) < 0.5

        def loss(batch: slice) -> Tensor:
            rows = order[batch]
            x = images[rows]
            for axis, chosen in zip((2, 3), flips, strict=True):
                flip = torch.from_numpy(chosen[batch])[:, None, None, None]
                x = torch.where(flip, x.flip(axis), x)
            return F.cross_entropy(model(x), labels[rows], label_smoothing=0.05)

        return loss

    exempt = tuple(getattr(model, "no_weight_decay", tuple)())
    validate = partial(measure, model, "val")
    common.fit(model, settings, draw, count=len(labels), exempt=exempt, validate=validate)
    return model.eval()
