"""Write a run's `report.html`: one file that opens anywhere and loads nothing from elsewhere.

What a run produced (prompts, responses, tracebacks) is untrusted text. It reaches the page through Jinja's autoescape
or as JSON whose `<`, `>` and `&` are escaped, scripts set it as text nodes only, and the page's content security
policy admits exactly our scripts, by hash.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from miles_api.errors import DataError
from miles_train._version import __version__
from miles_train.view.charts import chart_data
from miles_train.view.facts import attention, config_lines, explained, startup_text, tiles, time_shares
from miles_train.view.gaps import gap_page
from miles_train.view.hook_table import hook_rows
from miles_train.view.run_directory import RunDirectory, read_run
from miles_train.view.sample_pick import pick_samples

__all__ = ["REPORT", "main", "write_report"]

REPORT = "report.html"

_FILES = ("config.toml", "metrics.jsonl", "samples.jsonl", "hooks.json", "summary.json")
_STATUSES = ("finished", "failed", "interrupted", "running")
_LONGEST_FILE = 48


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Called by the driver at the end of a run, whether it finished or failed, and by `miles report`. Files of the run
    that are missing or partly written are named in the page. Raises `DataError` if `run_dir` is no run directory.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).is_file() for name in _FILES):
        raise DataError(f"{run_dir} is no run directory: it has none of {', '.join(_FILES)}")
    page = _page(read_run(run_dir), pick_samples(run_dir / "samples.jsonl"))
    target = run_dir / REPORT
    # Half a page never replaces a whole one, also when two reports of one run are written at once.
    with tempfile.NamedTemporaryFile("wb", dir=run_dir, prefix=f".{REPORT}.", delete=False) as file:
        file.write(page.encode("utf-8", "replace"))
    staged = Path(file.name)
    staged.chmod(0o666 & ~_umask())
    staged.replace(target)
    return target


def _page(run: RunDirectory, samples: dict[str, Any]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["shortened"] = _shortened
    scripts = [_asset("charts.js"), _asset("samples.js")]
    hooks = hook_rows(run.hooks)
    summary = run.summary
    status = str(summary.get("status", "unknown"))
    notes = summary.get("notes") or []
    return environment.from_string(_asset("report.html.j2")).render(
        title=str(summary.get("title") or run.path.resolve().name),
        status=status if status in _STATUSES else "unknown",
        started=_moment(run.started),
        finished=_moment(run.finished),
        path=str(run.path.resolve()),
        error=str(summary.get("error") or ""),
        notes=[str(note) for note in notes] if isinstance(notes, list) else [str(notes)],
        tiles=tiles(run),
        attention=attention(run, hooks),
        rollouts=len(run.rollouts),
        charts=(charts := chart_data(run)),
        gaps=gap_page(run),
        shares=time_shares(run),
        startup=startup_text(run),
        hooks=hooks,
        numbers=explained(run),
        has_samples=any(kind["rollouts"] for kind in samples.values()),
        config=config_lines(run.config),
        version=__version__,
        now=_moment(datetime.datetime.now(datetime.UTC).timestamp()),
        policy=_policy(scripts),
        style=Markup(_asset("report.css")),
        scripts=[Markup(script) for script in scripts],
        chart_json=_embedded(charts),
        sample_json=_embedded(samples),
    )


def _asset(name: str) -> str:
    return resources.files("miles_train.view").joinpath("page", name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"


def _embedded(value: Any) -> Markup:
    """Return JSON that may stand inside a `<script>` element."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _moment(unix: float | None) -> str:
    if unix is None:
        return ""
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _shortened(path: str) -> str:
    """Keep the last folder and the file's name of a long path."""
    return path if len(path) <= _LONGEST_FILE else f"…/{'/'.join(path.split('/')[-2:])}"


def _umask() -> int:
    # There is no way to read it but to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def main() -> int:
    """Write the report of the run directory named on the command line and print its path."""
    words = sys.argv[1:]
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python -m miles_train.view.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(words[0])))
    except DataError as error:
        print(f"miles report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
