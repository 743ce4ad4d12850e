"""The task of detecting tampered faces."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError, ModelError, RecipeError
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common import top_k
from tasks.common.data.calibration import positions_of, read_list, take
from tasks.common.data.images import Images
from tasks.common.models.timm_models import load_timm
from tasks.common.request import DataRequest, ModelRequest, describe_missing
from tasks.common.task import CalibrationSet, Chains, Evaluation, Exportable, LoadedModel, Task
from tasks.deepfake import tags
from tasks.deepfake.demo import scenes
from tasks.deepfake.demo.models import DEMO
from tasks.deepfake.index import CLASSES, Frames, open_frames
from tasks.deepfake.metrics import Curve, measures

#: Preprocessing of DeepfakeBench, except for CLIP backbones, which have their own.
_PREPROCESSING = {"crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}


class DeepfakeTask(Task):
    """Detection of tampered faces with timm backbones and two classes: real, fake."""

    name = "deepfake"
    tags = tags
    demo = "demo model on tampered scenes of digits"

    def load(self, request: ModelRequest) -> LoadedModel:
        """Load a detector; a backbone gets two classes, and DeepfakeBench's preprocessing."""
        missing = tags.CATALOGUE.missing_weights(request)
        if missing is not None:
            raise ModelError(describe_missing([missing]))
        if request.name in tags.DEMO_NAMES:
            model, stored = DEMO.load(request, tags.CATALOGUE.local_weights(request))
            tag, sha256 = tags.model_tag(request), stored.sha256(model, altered=False)
            transform = scenes.eval_transform()
            own = len(CLASSES), transform, transform, "digit-fakes", (1, scenes.SIDE, scenes.SIDE)
            return LoadedModel(model, tag, f"file {stored.path.name}", sha256, *own)
        usual: dict[str, Any] = {} if "clip" in request.name else _PREPROCESSING
        request = replace(
            request,
            model_args={"num_classes": len(CLASSES), **request.model_args},
            preprocessing={**usual, **request.preprocessing},
        )
        loaded = load_timm(request, tags.CATALOGUE)
        if loaded.classes != len(CLASSES):
            raise ModelError(f"{loaded.tag} has {loaded.classes} classes, and a detector has two.")
        return loaded

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        return find_family(loaded.model).build(loaded.model, recipe)

    def divergence(self, recipe: Recipe) -> Divergence:
        """Return the Kullback-Leibler divergence of class probabilities at a temperature."""
        return ClassifierDivergence(recipe.temperature)

    def exportable(
        self,
        loaded: LoadedModel,
        chains: Chains,
        part: str,
        images: CalibrationSet,
        data: DataRequest,
    ) -> Exportable:
        """Return the detector; its answer is the class with the largest logit."""
        return Exportable(
            chains[part],
            Samples.of(images.images).whole,
            lambda logits: logits.argmax(1),
            normalisation=loaded.normalisation,
            class_names=CLASSES,
        )

    def from_onnx(self, loaded: LoadedModel, models: Mapping[str, nn.Module]) -> nn.Module:
        assert loaded.input_shape is not None
        model = self.assemble(loaded, dict(models))
        found = model(torch.zeros(1, *loaded.input_shape))
        if found.shape != (1, len(CLASSES)):
            raise ModelError(
                f"The file gives outputs of shape {tuple(found.shape)} per frame, not two classes: "
                "export the checkpoint again."
            )
        return model

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Draw frames of FaceForensics++ c23's split ``train``, or take those of a list."""
        if recipe.calibration_transform == "train":
            raise RecipeError(
                "Detectors of tampered faces are calibrated without augmentation, which would add "
                "traces of its own: give --calibration-transform eval."
            )
        root = data.calibration_data or data.path
        source = self._open(loaded, root, tags.TRAINED_ON, "train").source
        order = np.random.default_rng(recipe.seed).permutation(len(source.ids))
        if data.calibration_list is not None:
            names = read_list(data.calibration_list).ids
            order = np.array(positions_of(names, source.ids, data.calibration_list, source.name))
        images = Images(
            source.ids, source.targets, source.read, loaded.eval_transform, data.skip_corrupt
        )
        taken, positions, skipped = take(images, order, recipe.calibration_images, recipe.seed)
        pixels, names = torch.stack(taken), [source.ids[position] for position in positions]
        digest = hashlib.sha256("\n".join(["eval", *names]).encode())
        digest.update(pixels.numpy().tobytes())
        return CalibrationSet(
            pixels,
            names,
            "eval",
            digest.hexdigest(),
            skipped,
            notes=images.notes(),
            dataset=source.name,
            split=source.split,
            listed=data.calibration_list is not None,
        )

    def evaluate(
        self,
        model: nn.Module,
        loaded: LoadedModel,
        data: DataRequest,
        device: torch.device,
        batch_size: int,
        workers: int,
        on_progress: OnProgress,
    ) -> Evaluation:
        """Measure frames and videos of the split ``test``; ``limit`` counts frames.

        ``n`` is the number of videos. Outcomes have one row per frame, with its video as cluster.
        """
        whole = self._open(loaded, data.path, data.evaluation or tags.TRAINED_ON, "test")
        source = whole.source.head(data.limit)
        images = Images(
            source.ids, source.targets, source.read, loaded.eval_transform, data.skip_corrupt
        )
        found = top_k.evaluate(model, images, source, device, batch_size, workers, on_progress)
        place = dict(zip(whole.source.ids, whole.video, strict=True))
        numbers = [place[name] for name in found.outcomes["sample"].tolist()]
        videos, cluster = np.unique(numbers, return_inverse=True)
        logits = torch.from_numpy(found.outputs["logits"]).double()
        fake = found.outcomes["label"] == 1
        if fake.all() or not fake.any():
            raise DataError(f"{source.name} {source.split} has one class only: raise --limit.")
        probability = logits.softmax(1)[:, 1].numpy()
        outcomes = {**found.outcomes, "cluster": cluster.astype(np.int32)}
        outcomes["frame_auc"] = Curve(probability, fake).auc_by_sample()
        del outcomes["rank"]
        count = len({*whole.video[: len(source.ids)]})
        return replace(
            found,
            metrics=measures(probability, fake, cluster),
            n=len(videos),
            outcomes=outcomes,
            dataset=found.dataset.model_copy(update={"count": count}),
            notes=[*found.notes, f"{len(numbers):,} frames of {len(videos):,} videos"],
        )

    def _open(self, loaded: LoadedModel, root: Any, name: str, split: str) -> Frames:
        """Open the frames of a split. Raises DataError."""
        if root is not None:
            return open_frames(root, name, split)
        if loaded.data is None:
            raise DataError(f"{loaded.tag} needs data: give --data. {tags.LAYOUT}.")
        if name != tags.TRAINED_ON:
            raise DataError(f"The demo model has its own data: leave --eval {name} out.")
        return scenes.demo_frames(split)


TASK = DeepfakeTask()
