"""`miles check [RUN.toml] [--flag value …] [--json]`: everything that can be known to be wrong, and the plan."""

from __future__ import annotations

import sys

import msgspec

from miles_api.checks.check import check_words
from miles_api.checks.plan import plan_lines, report_json
from miles_api.cli.run_help import print_run_help

__all__ = ["command"]

_OK, _REFUSED = 0, 2
_DESCRIPTION = """\
Check a run as `miles train` does before it starts: options, hooks, data, tokenizer, model config, sizes, directories.
Nothing starts and nothing is written; no GPU, Ray or torch is needed unless a hook imports it. What no installed
package can check is named.

exit codes:
  0  nothing is wrong
  2  refused; every problem is named

--json prints one object: {"ok", "problems": [{"flag"?, "message", "package"}], "plan": {…}, "hooks": [{"hook", "flag",
"reference", "file", "sha256", "distribution", "version", "abi", "checkable", "called", "note"}]}"""


class _CheckCommand:
    help = "check a run without starting it"

    def main(self, argv: list[str]) -> int:
        """Return 0 when nothing is wrong and 2 when something is."""
        if any(word in ("-h", "--help") for word in argv):
            print_run_help("miles check", _DESCRIPTION, usage="[--json] ")
            return _OK
        report = check_words([word for word in argv if word != "--json"], prog="miles check")
        if "--json" in argv:
            print(msgspec.json.encode(report_json(report)).decode())
            return _REFUSED if report.problems else _OK
        for line in plan_lines(report):
            print(line)
        if not report.problems:
            without = f" in what could be checked; not checked: {'; '.join(report.not_checked)}"
            print("ok: nothing wrong was found" + (without if report.not_checked else ""))
            return _OK
        sys.stdout.flush()
        count = len(report.problems)
        print(f"miles check: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
        for problem in report.problems:
            print(problem.message, file=sys.stderr)
        return _REFUSED


command = _CheckCommand()
