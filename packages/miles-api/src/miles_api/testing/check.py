"""`check_hook`: one hook against its stub and against everything that the stub's words promise."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.args import Args
from miles_api.errors import ConfigError, HookLoadError, MilesError, did_you_mean
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import BoundHook, bind, resolve
from miles_api.loading.load import TRAINER_PACKAGES, unwrapped
from miles_api.parsing.given import Given
from miles_api.testing.case import Case, case_of
from miles_api.testing.options import flat_options
from miles_api.testing.result import ConformanceSkip, Report
from miles_api.testing.samples import Maker
from miles_api.testing.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from miles_api.sample import Sample
    from miles_api.spec import HookSpec

__all__ = ["check_bound", "check_hook", "users_part"]

_SOURCE = "check_hook"


def check_hook(name: str, fn: Any, /, *, samples: Sequence[Sample] | None = None, **options: Any) -> Report:
    """Check that `fn` fits the hook `name` and behaves as its stub says, on inputs of every shape that a run has.

    `fn` is the hook itself or a reference to it (`path/file.py:fn`, `pkg.mod:fn`, a short name). `options` set `args`
    by name; all others have their defaults. With a `reward_key` the made rewards are dicts. `samples` take the place of
    the made ones, for a hook that needs labels or metadata of its own; prompts are made from them by taking the
    response away. Nothing is asked about results that may differ from call to call.

    Raises `HookLoadError` or `HookSignatureError` for what cannot be called at all, `ConformanceError` (also an
    `AssertionError`) naming hook, check, sample and field for what behaves otherwise, `ConformanceSkip` where the hook
    needs a package that is not installed, and `ConfigError` for a name that is no hook or no option.
    """
    __tracebackhide__ = True
    try:
        return _check_named(name, fn, samples, options)
    except MilesError as error:
        # Which of our lines found it says nothing to the author of a hook: a test shows his own, and those of the hook.
        cause = error.__cause__
        own = users_part(cause) if cause else None
        raise error.with_traceback(None) from (cause.with_traceback(own) if cause and own else None)


def users_part(error: BaseException) -> TracebackType | None:
    """Return an exception's traceback from the first frame on that is not ours; None if there is none."""
    own, ours = error.__traceback__, str(Path(__file__).parent.parent)
    while own is not None and own.tb_frame.f_code.co_filename.startswith(ours):
        own = own.tb_next
    return own


def _check_named(name: str, fn: Any, samples: Sequence[Sample] | None, options: dict[str, Any]) -> Report:
    if name not in REGISTRY:
        raise ConfigError(f"there is no hook {name!r}{did_you_mean(name, REGISTRY)}")
    spec = REGISTRY[name]
    bound = _loaded(spec, fn) if isinstance(fn, str) else bind(spec, _name_of(fn), fn)
    return check_bound(bound, {key: Given(value, _SOURCE) for key, value in options.items()}, samples)


def _loaded(spec: HookSpec, reference: str) -> BoundHook:
    try:
        return resolve(spec, reference)
    except HookLoadError as error:
        missing = (error.missing or "").partition(".")[0]
        if spec.side == "train" and missing in TRAINER_PACKAGES:
            raise ConformanceSkip(f"{reference} needs {missing}, which is not installed here") from error
        raise


def check_bound(bound: BoundHook, given: Mapping[str, Given], samples: Sequence[Sample] | None = None) -> Report:
    """Check a hook that was loaded and fits, as `check_hook` does; `given` are options by name, as written."""
    case = case_of(bound.spec.name, bound.spec.stage)
    flat = flat_options(unwrapped(bound.target), given)
    maker = Maker(samples, flat["reward_key"])
    if not _in_a_loop():
        return _check(bound, case, flat, given, maker)
    # Called from an async test: the checks have an event loop of their own, and a thread has room for one.
    return _in_a_thread(lambda: _check(bound, case, flat, given, maker))


def _check(bound: BoundHook, case: Case, flat: dict[str, Any], given: Mapping[str, Given], maker: Maker) -> Report:
    def args_for(trial: Trial) -> Args:
        host, _, port = trial.engine.url.removeprefix("http://").partition(":")
        served = {"sglang_router_ip": host, "sglang_router_port": int(port)} if port else {}
        own = {**served, "save": str(trial.directory), "load": str(trial.directory)}
        return Args({**flat, **{name: value for name, value in own.items() if name not in given}})

    with Trial(bound, args_for, maker) as trial:
        case.run(trial)
        trial.finish()
        return Report(bound.spec.name, bound.reference, trial.passed, case.left_out, trial.notes)


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _in_a_thread(call: Any) -> Report:
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="check_hook")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _name_of(fn: Any) -> str:
    named = unwrapped(fn)
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{named.__module__}:{named.__qualname__}"
