"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["clock", "duration", "number", "percent"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_SMALL, _THOUSAND, _LARGE = 1e-3, 1000, 1e7


def number(value: float | None) -> str:
    """Return three significant digits: `0.314`, `5.1`, `1,240`, `2e-6`."""
    if value is None:
        return "—"
    size = abs(value)
    if size != 0 and (size < _SMALL or size >= _LARGE):
        mantissa, exponent = f"{value:.{1 if size < _SMALL else 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= _THOUSAND else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share of 1 as `12.3 %`."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Return `0.14 s`, `41 s`, `12 min 30 s`, `5 h 12 min` or `3 d 4 h`."""
    if seconds < _MINUTE:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, name, smaller, smaller_name in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"


def clock(seconds: float) -> str:
    """Return `0:32` or `1:02:03`."""
    minutes, second = divmod(max(0, round(seconds)), _MINUTE)
    hours, minute = divmod(minutes, _MINUTE)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
