"""Run docs/notebook.ipynb and write its outputs into it: ``python scripts/run_notebook.py``."""

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"


def run_cells(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run all code cells in order, replace their outputs, and return the names they define."""
    namespace: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        cell["execution_count"] = number
        cell["outputs"] = _outputs("".join(cell["source"]), number, namespace)
    return namespace


def _outputs(source: str, number: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one cell; return its printed text, the value of its last expression, and its figures."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"<cell {number}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue().splitlines(keepends=True):
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    shown: dict[str, Any] = {"metadata": {}, "output_type": "display_data"}
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        result = {"data": data, "execution_count": number, **shown}
        outputs.append(result | {"output_type": "execute_result"})
    for figure in map(pyplot.figure, pyplot.get_fignums()):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=80, bbox_inches="tight")
        data = {"image/png": [base64.b64encode(png.getvalue()).decode()]}
        outputs.append({"data": data, **shown})
    pyplot.close("all")
    return outputs


if __name__ == "__main__":
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    run_cells(content)
    NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
