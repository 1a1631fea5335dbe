"""inspect.html: shows what inspect.json holds, loads nothing from elsewhere, and takes no text for markup."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtool.calibration.tokens import TextOptions
from qtool.options import ModelOptions
from qtool.pipeline.inspect import inspect_model
from qtool.progress import Silent
from qtool.report.inspection import CHARTS, write_inspection
from qtool.report.page import script

HOSTILE = "<b onclick='x'>"


def test_the_page_has_a_chart_for_each_measure_and_no_text_becomes_markup(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    text = TextOptions(source="demo:test", samples=2, length=16)
    results = inspect_model(ModelOptions(path=str(tiny_model("llama"))), text, tmp_path / "out", Silent())
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert page.count('<figure data-chart=\'{"kind":"lines"') == len(CHARTS) + 3
    assert all(f'"title":"{title} by block"' in page for title in CHARTS)
    assert all(f"<td>{row['name']}</td>" in page for row in results["linears"])
    assert not re.search(r"url\(|@import|https?://|src=", page.replace(script(), ""))

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoil(inner) for inner in value]
        return value + HOSTILE if isinstance(value, str) else value

    write_inspection(tmp_path / "spoiled.html", spoil(json.loads((tmp_path / "out" / "inspect.json").read_text())))
    spoiled = (tmp_path / "spoiled.html").read_text()
    assert HOSTILE not in spoiled and spoiled.count("&lt;b onclick=") > 50
