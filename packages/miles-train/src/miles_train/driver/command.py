"""`miles train [RUN.toml] [--flag value …]`: check, show the plan, start, train, report."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from miles_api.config import RunConfig, option_groups
from miles_api.errors import MilesError
from miles_api.hookset import configured_hooks
from miles_api.options import options_from
from miles_api.parse import add_option_flags, parse_run
from miles_api.run_options import RunOptions
from miles_train.driver.check import check_all, derive, idle_hooks
from miles_train.driver.run_dir import RunDir
from miles_train.driver.services import running
from miles_train.driver.train_loop import TrainLoop
from miles_train.options import ObjectiveOptions
from miles_train.view.progress import Progress

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["command", "plan"]


class _TrainCommand:
    help = "run a training described by a TOML file and flags"

    def main(self, argv: list[str]) -> int:
        """Return 0 when trained, 1 when the run failed; raises `ConfigError` for what is refused before it starts."""
        if any(word in ("-h", "--help") for word in argv):
            return _help()
        config = derive(parse_run(argv))
        check_all(config)
        for line in plan(config):
            print(line, flush=True)
        return _train(config)


def _help() -> int:
    parser = argparse.ArgumentParser(prog="miles train", description=_TrainCommand.help, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="TOML file that describes the run")
    add_option_flags(parser, option_groups())
    parser.print_help()
    return 0


def plan(config: RunConfig) -> list[str]:
    """Say what will run: the numbers that multiply to a step, and every hook that is not a default."""
    run = config.group(RunOptions)
    lines = [
        f"plan: {run.num_rollout} rollouts × {run.rollout_batch_size} prompts × {run.n_samples_per_prompt} samples, "
        f"{run.num_steps_per_rollout} optimizer steps of {run.global_batch_size} each; {run.loss_type}",
        f"      model {run.hf_checkpoint}, run directory {run.run_dir}",
    ]
    idle = idle_hooks(config)
    for hook, references in configured_hooks(config.args).items():
        remark = f"  (not called: {idle[hook]})" if hook in idle else ""
        lines.append(f"      {hook}: {', '.join(references)}{remark}")
    return lines + [f"      {note}" for note in _notes(config)]


def _notes(config: RunConfig) -> list[str]:
    """Say which options change what is computed, not only how fast."""
    objective: ObjectiveOptions = options_from(config.args, ObjectiveOptions)
    if config.group(RunOptions).loss_type == "sft_loss":
        return []
    notes = []
    if objective.use_rollout_logprobs:
        notes.append("use_rollout_logprobs: the engine's log-probs are the old ones; no pass recomputes them")
    if objective.skip_zero_advantage:
        notes.append("skip_zero_advantage: samples without advantage are left out of the forward pass")
    return notes


def _train(config: RunConfig) -> int:
    run = config.group(RunOptions)
    run_dir = RunDir(config, f"{Path(run.run_dir).name}: {run.loss_type}", _notes(config))
    signal.signal(signal.SIGTERM, _terminated)
    status, problem = "failed", None
    try:
        with (
            Progress(run.num_rollout) as progress,
            running(config, lambda what: progress.phase(what, None)) as services,
        ):
            run_dir.log("run", -1, {}, services.seconds)
            TrainLoop(config, services, run_dir, progress).run()
        status = "finished"
    except MilesError as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    except Exception:
        # Not one of ours: the whole traceback is the message, in the report as on the screen.
        problem = traceback.format_exc()
    report = run_dir.close(status, problem)
    if problem:
        print(f"miles train: the run failed\n{problem}", file=sys.stderr)
    print(f"report: {report}")
    return 0 if status == "finished" else 1


def _terminated(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


command = _TrainCommand()
