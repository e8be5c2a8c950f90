"""What a run will do, in words and as plain data: its numbers, and every hook it was given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.checks.run_checks import services_of
from miles_api.errors import counted
from miles_api.run_options import RunOptions

if TYPE_CHECKING:
    from miles_api.checks.check import CheckReport
    from miles_api.checks.hook_rows import HookRow

__all__ = ["plan_lines", "report_json"]

_NUMBERS = ("num_rollout", "rollout_batch_size", "n_samples_per_prompt", "num_steps_per_rollout", "global_batch_size",
            "loss_type", "hf_checkpoint", "run_dir")  # fmt: skip
_INDENT = " " * 6


def plan_lines(report: CheckReport) -> list[str]:
    """Say what will run: the numbers that multiply to a step, and every hook that is not a default."""
    if report.config is None:
        return []
    run = report.config.group(RunOptions)
    services = services_of(run)
    without = [] if "train" in services else ["no trainer starts"]
    if "engines" not in services:
        without.append("no engine starts" + (", so nothing is evaluated" if run.eval_interval is not None else ""))
    sizes = (run.rollout_batch_size, run.n_samples_per_prompt, run.num_steps_per_rollout, run.global_batch_size)
    prompts, group, steps, step = map(_known, sizes)
    each = "" if steps == 1 else " each"
    lines = [
        f"plan: {counted(run.num_rollout, 'rollout')} × {counted(prompts, 'prompt')} × {counted(group, 'sample')}, "
        f"{counted(steps, 'optimizer step')} of {step}{each}; {run.loss_type}",
        f"{_INDENT}model {_known(run.hf_checkpoint)}, run directory {run.run_dir}",
        *(_INDENT + text for text in without),
        *(_INDENT + _hook_line(row) for row in report.hooks),
        *(_INDENT + note for note in report.notes),
    ]
    return lines + [f"{_INDENT}not checked: {text}" for text in report.not_checked]


def _hook_line(row: HookRow) -> str:
    """Name a hook, where it comes from, and what is special about it."""
    # The path of a file reference is shown already.
    file = "" if not row.file or row.reference.startswith(row.file) else _short(row.file)
    origin = [file, f"{row.distribution} {row.version}".strip(), row.sha256[:12]]
    remarks = [f"not called: {row.note}" if not row.called else row.note]
    remarks += ["not checkable: it takes (*args, **kwargs)"] if not row.checkable and row.abi else []
    shown = ", ".join(filter(None, origin))
    return (
        f"{row.hook}: {row.reference}"
        + (f"  [{shown}]" if shown else "")
        + "".join(f"  ({remark})" for remark in remarks if remark)
    )


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])


def report_json(report: CheckReport) -> dict[str, Any]:
    """Return the report as plain data: what `miles check --json` prints."""
    plan: dict[str, Any] = {}
    if report.config is not None:
        run = report.config.group(RunOptions)
        plan = {name: getattr(run, name) for name in _NUMBERS}
        plan |= {"services": services_of(run), "notes": report.notes, "not_checked": report.not_checked}
    return {
        "ok": not report.problems,
        "problems": msgspec.to_builtins(report.problems),
        "plan": plan,
        "hooks": msgspec.to_builtins(report.hooks),
    }


def _known(value: int | str | None) -> int | str:
    """Return `?` for what is not set: the report says so among the problems."""
    return "?" if value is None else value
