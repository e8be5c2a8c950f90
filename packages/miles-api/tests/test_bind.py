import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from miles_api import Args, GenerateFnInput
from miles_api.bind import bind
from miles_api.errors import HookSignatureError
from miles_api.hooks import REGISTRY


def bound(name, target, args=None):
    return bind(REGISTRY[name], "mine", target, args)


def test_a_hook_may_leave_out_keywords_it_does_not_need():
    def convert(args, samples, *, rewards):
        return rewards

    assert bound("convert_samples", convert)(None, [], raw_rewards=[1], rewards=[2]) == [2]


def test_a_hook_called_by_keyword_may_take_its_arguments_in_any_order():
    def tis(loss_masks, args, pg_loss):
        return pg_loss, loss_masks, args

    names = REGISTRY["importance_weights"].forms[0].signature.parameters
    hook = bound("importance_weights", tis)
    assert hook(**{name: name for name in names}) == ("pg_loss", "loss_masks", "args")


def test_a_required_argument_that_miles_does_not_pass_shows_both_sides():
    def tis(args, extra, *, pg_loss): ...

    with pytest.raises(HookSignatureError) as error:
        bound("importance_weights", tis)
    text = str(error.value)
    assert "--custom-tis-function-path" in text
    assert "miles calls: importance_weights(args, *, pg_loss" in text
    assert "tis(args, extra, *, pg_loss)" in text
    assert "'extra'" in text


def test_too_few_parameters_do_not_fit():
    with pytest.raises(HookSignatureError, match="too many positional arguments"):
        bound("reward", lambda args: 0.0)


def test_the_outer_signature_counts_when_a_decorator_wraps_the_hook():
    def inner(args, sample): ...

    @functools.wraps(inner)
    def outer(args): ...

    with pytest.raises(HookSignatureError):
        bound("reward", outer)


def test_the_two_forms_of_generate_are_told_apart_by_binding():
    async def three(args, sample, sampling_params): ...
    async def one(anything: GenerateFnInput): ...

    assert bound("generate", three).form.name == "plain"
    assert bound("generate", one).form.name == "input"


def test_a_form_that_fits_twice_is_ambiguous():
    async def either(a, b=None, c=None): ...

    with pytest.raises(HookSignatureError, match="fits 2 forms"):
        bound("generate", either)


def test_a_rollout_may_be_a_class_built_from_one_input():
    class Rollout:
        def __init__(self, input): ...

        def __call__(self, input): ...

    hook = bound("rollout", Rollout)
    assert hook.form.name == "class"
    assert isinstance(hook("input"), Rollout)


def test_a_callable_class_is_built_with_args_when_it_takes_them():
    class WithArgs:
        def __init__(self, args):
            self.bonus = args.bonus

        def __call__(self, args, sample):
            return self.bonus

    class Without:
        def __call__(self, args, sample):
            return 7

    assert bound("reward", WithArgs, Args({"bonus": 3}))(None, None) == 3
    assert bound("reward", Without, Args({}))(None, None) == 7


def test_a_data_source_that_lacks_methods_is_refused_by_their_names():
    class Half:
        def __init__(self, args): ...
        def get_samples(self, num_samples): ...

    with pytest.raises(HookSignatureError, match="add_samples, save, load"):
        bound("data_source", Half)


def test_an_async_hook_is_refused_where_miles_calls_synchronously():
    async def post(args, samples): ...

    with pytest.raises(HookSignatureError, match="must be `def`"):
        bound("reward_post_process", post)


def test_a_plain_function_is_accepted_where_miles_awaits_and_runs_off_the_loop():
    import threading

    def reward(args, sample):
        return threading.current_thread() is threading.main_thread()

    hook = bound("reward", reward)
    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(hook.acall(pool, None, None)) is False
    assert hook.stats.calls == 1


def test_errors_of_a_hook_are_its_own_and_are_counted():
    def reward(args, sample):
        raise KeyError("label")

    hook = bound("reward", reward)
    with pytest.raises(KeyError):
        hook(None, None)
    assert (hook.stats.calls, hook.stats.errors) == (1, 1)
