"""The notebook is run, with fewer rows and steps, and a tiny model."""

import json

import pytest
from pages import RECIPES


@pytest.mark.slow
def test_cells_run(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((RECIPES.parent / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"])
        for old, new in (
            ("(0, 96), (96, 496), (496, 796)", "(0, 8), (8, 20), (20, 30)"),
            ("epochs=4", "epochs=1"),
            ("=5e-5", "=1e-3"),
        ):
            code = code.replace(old, new)
        code = code.replace("bundled_model()", repr(bert))
        exec(compile(code, "quickstart.ipynb", "exec"), names)
    assert names["output"].metrics["kept_round"] == 1 and (tmp_path / "notebook" / "model.safetensors").is_file()


def test_cells_are_kept_as_they_came_out():
    cells = json.loads((RECIPES.parent / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    numbers = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    printed = "".join(
        text
        for cell in cells
        for output in cell.get("outputs", [])
        for text in output.get("text", [])
        if "text" in output
    )
    assert "Round 1: accuracy" in printed and "held-out pairs (`eval_dataset`)" in printed and "Warning" not in printed
