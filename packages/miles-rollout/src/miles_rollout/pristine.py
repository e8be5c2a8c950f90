"""Copies of samples as the data source handed them out, for a group that has to start over.

A hook may change anything in a sample and keep hold of it, so what it gets is copied beforehand. Our own defaults only
fill in a response: where no other code sees the samples, what they were is worked out when it is needed.
"""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from miles_api.sample import PrefixCacheInfo, Sample, SpecInfo, Status

if TYPE_CHECKING:
    from miles_api.rollout_types import Group

__all__ = ["copied", "copy_group", "copy_sample", "restore", "without_response"]

_FIELDS = Sample.__struct_fields__
_values = attrgetter(*_FIELDS)
_SHARED = frozenset({str, int, float, bool, bytes, type(None), Status})
_COUNTS = (SpecInfo, PrefixCacheInfo)


def copy_group(group: Group) -> Group:
    """Return a group of copied samples; see `copy_sample`."""
    return [[copy_sample(s) for s in item] if isinstance(item, list) else copy_sample(item) for item in group]


def copy_sample(sample: Sample) -> Sample:
    """Return an independent copy: `copy.deepcopy` at a fraction of its price.

    Almost every field of a sample that was not generated yet is a default, a string or a number.
    """
    shared = _SHARED
    fields = dict(zip(_FIELDS, _values(sample), strict=True))
    for field, value in fields.items():
        if type(value) not in shared:
            fields[field] = copied(value)
    twin = Sample(**fields)
    if sample.__dict__:
        twin.__dict__.update(copied(sample.__dict__))
    return twin


def without_response(sample: Sample) -> Sample:
    """Return a copy of a sample that was handed out without a response, as it was then but for its prompt's tokens."""
    twin = copy_sample(sample)
    twin.reset_for_retry()
    return twin


def restore(sample: Sample, copy: Sample) -> None:
    """Make `sample`, the same object, what it was when `copy` was taken of it."""
    twin = copy_sample(copy)
    for field, value in zip(_FIELDS, _values(twin), strict=True):
        setattr(sample, field, value)
    sample.__dict__.clear()
    sample.__dict__.update(twin.__dict__)


def copied(value: Any) -> Any:
    """Return an independent copy of a value: as `copy.deepcopy`, and cheap for text, numbers and token ids."""
    kind = type(value)
    if kind in _SHARED:
        return value
    if kind is list:
        # Token ids and log-probs: one kind of immutable value.
        flat = _SHARED.issuperset(map(type, value))
        return value.copy() if flat else [copied(item) for item in value]
    if kind is dict:
        return {key: copied(item) for key, item in value.items()} if value else {}
    return copy.copy(value) if kind in _COUNTS else copy.deepcopy(value)
