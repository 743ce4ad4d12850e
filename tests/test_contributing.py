"""The code in CONTRIBUTING.md runs as it stands."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from fimaq_core import families, pipeline, recipe
from fimaq_core.fisher import losses
from tasks.common import registry


def test_examples_run(tmp_path: Path) -> None:
    before = dict(recipe.METHODS), list(recipe.LOSSES), dict(losses.PLAIN), list(families.FAMILIES)
    stages = list(pipeline.STAGES)
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    scope = {"results": str(tmp_path)}
    try:
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), scope)  # the project's own text
        assert scope["record"].modules.quantized
        assert scope["record"].last_loss.keys() == {"body", "fc2"}
        (path,) = tmp_path.glob("**/quantized.safetensors")
        tensors = load_file(path)
        scales = [tensors[name] for name in tensors if name.endswith("input_quantizer.scale")]
        assert len(scales) == 2
        assert all(torch.equal(scale.log2(), scale.log2().round()) for scale in scales)
    finally:
        recipe.METHODS.clear()
        recipe.METHODS.update(before[0])
        recipe.LOSSES[:] = before[1]
        losses.PLAIN.clear()
        losses.PLAIN.update(before[2])
        families.FAMILIES[:] = before[3]
        pipeline.STAGES[:] = stages
        registry._REGISTERED.clear()
