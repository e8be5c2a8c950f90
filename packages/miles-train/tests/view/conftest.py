from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        lines: list[dict[str, Any]] | None = None,
        samples: list[dict[str, Any]] | None = None,
        **files: Any,
    ) -> Path:
        run = tmp_path / "a-run"
        run.mkdir(exist_ok=True)
        for name, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
            if rows is not None:
                (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("summary", "hooks"):
            if name in files:
                (run / f"{name}.json").write_text(json.dumps(files[name]))
        if "config" in files:
            (run / "config.toml").write_text(files["config"])
        return run

    return make
