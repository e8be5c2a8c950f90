"""One chart of a report, as plain data that `page/charts.js` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_train.view.series import present

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["one_chart"]


def one_chart(
    title: str,
    series: list[dict[str, Any]],
    unit: str = "",
    *,
    text: str = "",
    zero: bool = False,
    log: bool = False,
    tall: bool = False,
    wide: bool = False,
    lines: Iterable[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Describe one chart: `zero` starts its axis at 0, `log` makes it logarithmic, `lines` are drawn across.

    A share's axis ends at 100 %, but for one that is above it.
    """
    share = unit == "share" and all(value <= 1 for one in series for value in present(one.get("hi", one["y"])))
    return {
        "title": title,
        "unit": unit,
        "text": text,
        "series": series,
        "zero": zero,
        "log": log,
        "most": 1.0 if share else None,
        "tall": tall,
        "wide": wide,
        "lines": list(lines),
    }
