import copy
import pickle

import pytest

from miles_api import Args


def test_reads_fall_through_to_the_options_and_a_wrong_name_suggests_the_nearest():
    args = Args({"rollout_batch_size": 4})
    assert args.rollout_batch_size == 4
    with pytest.raises(AttributeError, match="rollout_batch_size"):
        args.rollout_batchsize  # noqa: B018


def test_a_write_stays_in_the_overlay_of_one_hook():
    args = Args({"lr": 1.0})
    mine, other = args.fork(), args.fork()
    mine.lr, mine.cache = 2.0, {}
    assert (mine.lr, other.lr, args.lr) == (2.0, 1.0, 1.0)
    assert mine.overlay() == {"lr": 2.0, "cache": {}}
    assert not hasattr(other, "cache")


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_carry_the_overlay_and_are_independent(twin):
    args = Args({"lr": 1.0})
    args.seen = 1
    again = twin(args)
    again.seen = 2
    assert (args.seen, again.seen, again.lr) == (1, 2, 1.0)


def test_only_what_was_written_can_be_deleted():
    args = Args({"lr": 1.0})
    args.lr = 2.0
    del args.lr
    assert args.lr == 1.0
    with pytest.raises(AttributeError):
        del args.lr


def test_what_a_hook_changes_inside_a_list_or_dict_stays_its_own_and_is_listed():
    options = {"stop": ["a"], "extra": {"deep": [1]}}
    args = Args(options)
    mine, other = args.fork(), args.fork()
    mine.stop.append("b")
    mine.extra["deep"].append(2)
    assert (mine.stop, mine.extra) == (["a", "b"], {"deep": [1, 2]})
    assert (other.stop, other.extra) == (["a"], {"deep": [1]})
    assert options == {"stop": ["a"], "extra": {"deep": [1]}}
    assert mine.overlay() == {"stop": ["a", "b"], "extra": {"deep": [1, 2]}}
    assert other.overlay() == {}
    assert mine.stop is mine.stop


def test_a_change_inside_a_list_travels_with_a_pickle():
    args = Args({"stop": ["a"]})
    args.stop.append("b")
    assert pickle.loads(pickle.dumps(args)).stop == ["a", "b"]


def test_a_name_that_is_not_there_can_be_asked_for_with_a_default():
    args = Args({"lr": 1.0})
    assert getattr(args, "my_own", 5) == 5
    assert not hasattr(args, "my_own")


def test_an_error_about_a_missing_name_can_be_pickled():
    with pytest.raises(AttributeError) as error:
        Args({"rollout_batch_size": 4}).rollout_batchsize  # noqa: B018
    assert "did you mean 'rollout_batch_size'" in str(pickle.loads(pickle.dumps(error.value)))


def test_args_list_what_they_hold():
    args = Args({"lr": 1.0})
    args.seen = 1
    assert set(args) == {"lr", "seen"}
    assert "seen" in args
    assert dir(args) == ["lr", "seen"]
    assert repr(args) == "Args(1 options, 1 written)"


def test_a_field_of_a_sample_that_is_asked_of_args_says_that_args_comes_first():
    with pytest.raises(AttributeError, match="args is a hook's first parameter") as error:
        Args({"lr": 1.0}).response  # noqa: B018
    assert type(error.value).__name__ == "NoSuchOption"
