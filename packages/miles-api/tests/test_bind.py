import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from miles_api import Args, GenerateFnInput, Sample
from miles_api.errors import HookSignatureError
from miles_api.hook_options import HookOptions
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import bind
from miles_api.loading.hookset import HookSet


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

        async def __call__(self, input):
            return input

    hook = bound("rollout", Rollout)
    assert (hook.form.name, hook.constructs) == ("class", True)
    made = hook.built("constructor input")
    assert isinstance(made.target, Rollout)
    assert made.is_async


def test_a_rollout_class_that_cannot_be_called_is_refused():
    class Rollout:
        def __init__(self, input): ...

    with pytest.raises(HookSignatureError, match="lacks __call__"):
        bound("rollout", Rollout)


@pytest.mark.parametrize("takes_args", [True, False])
def test_a_callable_class_is_built_once_with_args_when_it_takes_them(tmp_path, takes_args):
    body = "self.bonus = args.seed" if takes_args else "self.bonus = 7"
    (tmp_path / "cls.py").write_text(
        f"class Score:\n    def __init__(self{', args' if takes_args else ''}):\n        {body}\n"
        "    def __call__(self, args, sample):\n        return self.bonus\n"
    )
    options = dict.fromkeys(HookOptions.__struct_fields__)
    args = Args({**options, "group_rm": False, "seed": 7, "custom_rm_path": f"{tmp_path}/cls.py:Score"})
    assert HookSet(args, ["reward"]).need("reward")(args, None) == 7
    assert HookSet(args, ["reward"], build=False).need("reward").constructs


def test_a_method_named_on_its_class_is_refused_before_it_is_called():
    class Scores:
        def score(self, args, sample): ...

    with pytest.raises(HookSignatureError, match="missing a required argument: 'sample'"):
        bound("reward", Scores.score)
    assert bound("reward", Scores().score)


def test_a_partial_and_a_class_with_an_async_call_are_hooks():
    async def weighted(weight, args, sample):
        return weight

    class Score:
        async def __call__(self, args, sample): ...

    assert bound("reward", functools.partial(weighted, 2.0)).is_async
    assert bound("reward", Score).is_async


def test_a_plain_wrapper_around_an_async_hook_is_awaited():
    async def inner(args, sample):
        return 4

    def outer(args, sample):
        return inner(args, sample)

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(bound("reward", outer).acall(pool, None, None)) == 4


def test_what_a_hook_writes_to_args_stays_its_own():
    def reward(args, sample):
        args.seed += 1
        return args.seed

    args = Args({"seed": 1})
    hook, other = bound("reward", reward, args.fork()), bound("reward", reward, args.fork())
    assert (hook(args, None), hook(args, None), other(args, None)) == (2, 3, 2)
    assert args.seed == 1


def test_a_hook_called_by_keyword_must_take_some_of_the_arguments():
    with pytest.raises(HookSignatureError, match="takes none of the arguments"):
        bound("importance_weights", lambda: None)


def test_a_data_source_that_lacks_methods_is_refused_by_their_names():
    class Half:
        def __init__(self, args): ...
        def get_samples(self, num_samples): ...

    with pytest.raises(HookSignatureError, match="lacks add_samples, load, save"):
        bound("data_source", Half)


def test_a_data_source_must_take_args():
    class Source:
        def get_samples(self, n): ...
        def add_samples(self, samples): ...
        def save(self, rollout_id): ...
        def load(self, rollout_id): ...

    with pytest.raises(HookSignatureError, match="too many positional arguments"):
        bound("data_source", Source)


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
    with pytest.raises(KeyError) as error:
        hook(None, Sample(index=3, prompt="2+2", label="4"))
    assert (hook.stats.calls, hook.stats.errors) == (1, 1)
    assert error.value.__notes__ == [
        "raised by the reward hook mine",
        "on sample 3: prompt '2+2', response '', label '4'",
    ]


def test_an_async_hook_is_counted_timed_and_given_its_own_args():
    async def reward(args, sample):
        await asyncio.sleep(0)
        return args.seed

    hook = bound("reward", reward, Args({"seed": 3}))
    assert asyncio.run(hook.acall(None, Args({"seed": 4}), None)) == 3
    assert hook.stats.calls == 1
    assert hook.stats.seconds > 0


def test_a_hook_called_by_keyword_gets_its_own_args():
    def provider(args, **others):
        args.seen = True

    view = Args({"seed": 1})
    shared = Args({"seed": 2})
    names = dict.fromkeys(REGISTRY["model_provider"].forms[0].signature.parameters)
    bound("model_provider", provider, view)(**{**names, "args": shared})
    assert (view.overlay(), shared.overlay()) == ({"seen": True}, {})


class Source:
    def __init__(self, args): ...
    def get_samples(self, num_samples): ...
    def add_samples(self, samples): ...
    def save(self, rollout_id): ...
    def load(self, rollout_id=None): ...


class Middleware:
    def __init__(self, app): ...
    async def __call__(self, scope, receive, send): ...


class Rollout:
    def __init__(self, input): ...
    def __call__(self, input): ...


def _save_nothing(self): ...


async def _save_later(self, rollout_id): ...


def _yield_samples(self, num_samples):
    yield


async def _scope_alone(self, scope): ...


@pytest.mark.parametrize(
    ("name", "cls", "method", "problem"),
    [
        ("data_source", Source, {"save": _save_nothing}, r"calls: data_source\.save\(rollout_id, /\)\n.*declares: "),
        ("data_source", Source, {"add_samples": None}, "its add_samples is a NoneType, not a method"),
        ("data_source", Source, {"save": _save_later}, "its save must be `def`, it is `async def`"),
        ("data_source", Source, {"get_samples": _yield_samples}, "its get_samples is a generator"),
        ("router_middleware", Middleware, {"__call__": lambda self, a, b, c: None}, "__call__ must be `async def`"),
        ("router_middleware", Middleware, {"__call__": _scope_alone}, "too many positional arguments"),
        ("rollout", Rollout, {"__call__": lambda self: None}, "too many positional arguments"),
        ("rollout", Rollout, {"__call__": None}, "its __call__ is a NoneType"),
    ],
)
def test_a_class_whose_method_cannot_be_called_as_miles_does_is_refused(name, cls, method, problem):
    assert bound(name, cls).constructs
    with pytest.raises(HookSignatureError, match=problem):
        bound(name, type("Mine", (cls,), method))


def test_methods_may_be_static_or_given_by_a_property_or_take_anything_and_a_rollout_may_be_async():
    class Mine(Source):
        add_samples = staticmethod(lambda samples: None)
        save = classmethod(lambda cls, rollout_id: None)
        load = property(lambda self: print)

        def get_samples(*anything): ...

    class Async(Rollout):
        async def __call__(self, *inputs): ...

    assert bound("data_source", Mine).constructs
    assert bound("rollout", Async).constructs


def _yielding(*args):
    yield 0.0


async def _async_yielding(*args):
    yield 0.0


class _Yielding:
    def __call__(self, args, sample):
        yield 0.0


def _older_loss(args, batch, logits, sum_of_sample_mean):
    yield logits


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("reward", _yielding),
        ("reward", _async_yielding),
        ("reward", _Yielding),
        ("reward", _Yielding()),
        ("reward", functools.partial(_yielding, 1)),
        ("before_log_prob", _yielding),
        ("loss", _older_loss),
    ],
)
def test_a_generator_whose_body_a_call_would_not_run_is_refused(name, target):
    with pytest.raises(HookSignatureError, match="is a generator: calling it runs nothing"):
        bound(name, target)


def test_the_call_of_a_class_may_take_no_self():
    class Score:
        @staticmethod
        def __call__(args, sample):
            return 3

    class Partial:
        __call__ = functools.partial(lambda weight, args, sample: weight, 4)

    assert bound("reward", Partial).built()(None, None) == 4
    assert bound("reward", Score).built()(None, None) == 3
