"""Data sources that lose, repeat or break groups are found."""

from pathlib import Path

import msgspec
import pytest

from miles_api import Sample, Status
from miles_api.testing import ConformanceError, MemorySource, make_prompt
from miles_api.testing import check_hook as check


def refused(name, fn, **options):
    with pytest.raises(ConformanceError) as caught:
        check(name, fn, **options)
    return caught.value


class Source(MemorySource):
    """A whole data source, whose subclasses forget one thing each."""

    def __init__(self, args):
        self._size, self._path = args.n_samples_per_prompt, Path(args.save, "source.json")
        self._next, self.returned = 0, []

    def get_samples(self, num_samples):
        taken, self.returned = self.returned[:num_samples], self.returned[num_samples:]
        return [*taken, *(self.group() for _ in range(num_samples - len(taken)))]

    def group(self):
        self._next += self._size
        return [make_prompt(group_index=self._next, index=self._next + i) for i in range(self._size)]

    def save(self, rollout_id):
        state = [self._next, [[sample.to_dict() for sample in group] for group in self.returned]]
        self._path.write_bytes(msgspec.json.encode(state))

    def load(self, rollout_id=None):
        self._next, groups = msgspec.json.decode(self._path.read_bytes())
        self.returned = [[Sample.from_dict(sample) for sample in group] for group in groups]


class Forgets(Source):
    def load(self, rollout_id=None):
        pass


class LosesTheBuffer(Source):
    def load(self, rollout_id=None):
        super().load(rollout_id)
        self.returned = []


class NewFirst(Source):
    def get_samples(self, num_samples):
        return [self.group() for _ in range(num_samples)]


class CountsAnew(Source):
    def get_samples(self, num_samples):
        self._next = 0
        return super().get_samples(num_samples)


class TooFew(Source):
    def get_samples(self, num_samples):
        return super().get_samples(1)


class Numberless(Source):
    def group(self):
        return [make_prompt(index=None) for _ in range(self._size)]


class Groupless(Source):
    def group(self):
        return [make_prompt(group_index=None, index=sample.index) for sample in super().group()]


class Promptless(Source):
    def group(self):
        return [make_prompt(prompt="", index=sample.index) for sample in super().group()]


class Finished(Source):
    def group(self):
        return [make_prompt(status=Status.COMPLETED, index=sample.index) for sample in super().group()]


class Contradicts(Source):
    def group(self):
        return [make_prompt(response_length=1, index=sample.index) for sample in super().group()]


class Flat(Source):
    def get_samples(self, num_samples):
        return super().get_samples(1)[0][:num_samples]


class SmallGroups(Source):
    def group(self):
        return super().group()[1:]


class CountsInWords(Source):
    def get_buffer_length(self):
        return "three"


class OneObject(Source):
    def group(self):
        return [super().group()[0]] * self._size


@pytest.mark.parametrize(
    ("source", "problem", "field"),
    [
        (Forgets, "after load", "group_index"),
        (LosesTheBuffer, "after load", "group_index"),
        (NewFirst, "did not come first", None),
        (CountsAnew, "repeats", "index"),
        (TooFew, "returned 1 groups; 2 were asked for", None),
        (OneObject, "one Sample object twice", None),
        (Numberless, "is missing: resumed runs and seeds need it", "index"),
        (Groupless, "is missing: rewards are normalised by it", "group_index"),
        (Promptless, "is empty", "prompt"),
        (Finished, "is <Status.COMPLETED", "status"),
        (Contradicts, "is 1 with 0 tokens", "response_length"),
        (Flat, "a list of groups, each a list of Samples", None),
        (SmallGroups, "group 0 has 2 samples; --n-samples-per-prompt is 3", None),
        (CountsInWords, "get_buffer_length() returned 'three'", None),
    ],
)
def test_a_data_source_that_loses_or_repeats_something_is_found(source, problem, field):
    assert check("data_source", Source).passed
    error = refused("data_source", source)
    assert problem in str(error)
    assert error.field == field
