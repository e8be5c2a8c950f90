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
