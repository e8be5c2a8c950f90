import copy
import datetime
import enum
import math
import os
import pickle
import random
import struct
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from miles_api import Sample, wire
from miles_api.errors import WireError
from miles_api.packing.packed import ArrayBlob, PackedColumn

MORE = float(os.environ.get("MILES_EXAMPLES", "1"))
"""How many times as many examples: the whole suite has seconds, a search for the odd one has minutes."""


def tried(examples):
    return settings(deadline=None, max_examples=round(examples * MORE), suppress_health_check=list(HealthCheck))


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20)
    | st.text(st.characters(categories=["Cs", "L"]), max_size=4)
)  # fmt: skip
keys = st.text(max_size=5) | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=4) | st.booleans()
blobs = st.builds(lambda n, m: ArrayBlob.of(np.arange(n * m, dtype="int16").reshape(n, m)), *[st.integers(0, 4)] * 2)
values = st.recursive(
    scalars | blobs,
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4)
        | st.sets(st.text(max_size=3) | st.integers(), max_size=3)
        | st.frozensets(st.binary(max_size=3) | st.tuples(st.integers()), max_size=3)
    ),
    max_leaves=12,
)  # fmt: skip
maps = st.dictionaries(keys, values, max_size=4)
log_probs = st.lists(st.floats(width=32), max_size=20)
names = st.text("abcdefgh_", min_size=1, max_size=8).filter(lambda name: not hasattr(Sample(), name))
samples = st.builds(
    lambda fields, extra: _with(Sample(**fields), extra),
    st.fixed_dictionaries(
        {},
        optional={
            "group_index": st.none() | st.integers(0, 2**70), "index": st.integers(), "rollout_id": st.integers(),
            "prompt": st.text() | st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), max_size=3),
            "tokens": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20) | st.lists(st.integers(), max_size=4),
            "multimodal_inputs": st.none() | maps, "multimodal_train_inputs": st.none() | maps,
            "response": st.text(), "response_length": st.integers(0, 9), "label": values,
            "reward": st.none() | st.booleans() | st.integers() | st.floats() | st.dictionaries(st.text(), st.floats()),
            "loss_mask": st.none() | st.lists(st.integers(0, 1)) | st.lists(st.integers(-200, 200), max_size=6)
            | st.lists(st.floats(), max_size=4),
            "weight_versions": st.lists(st.text(max_size=3), max_size=3),
            "rollout_log_probs": st.none() | log_probs, "teacher_log_probs": st.none() | log_probs,
            "rollout_routed_experts": st.none() | blobs | st.lists(st.lists(st.integers())) | st.binary(),
            "remove_sample": st.booleans(), "status": st.sampled_from(Sample.Status), "metadata": maps,
            "generate_function_path": st.none() | st.text(), "custom_rm_path": st.none() | st.text(),
            "train_metadata": st.none() | maps, "routing_key": st.none() | st.text(),
            "session_id": st.none() | st.text(), "non_generation_time": st.floats(0, 1e9),
            "spec_info": st.builds(Sample.SpecInfo, spec_verify_ct=st.integers(0, 99)),
            "prefix_cache_info": st.builds(Sample.PrefixCacheInfo, cached_tokens=st.integers(0, 99)),
        },
    ),
    st.dictionaries(names, values, max_size=3),
)  # fmt: skip
groups = st.lists(st.lists(samples | st.lists(samples, max_size=2), max_size=2), max_size=2)


def _with(sample, extra):
    sample.__dict__.update(extra)
    return sample


def form(value):
    """A form in which equal means: same types, same values, NaN as itself, a mask of booleans as one of numbers."""
    if isinstance(value, Sample):
        fields = {name: getattr(value, name) for name in Sample.__struct_fields__}
        return "Sample", form(fields), form(dict(value.__dict__))
    if isinstance(value, msgspec.Struct):
        return type(value).__name__, form(msgspec.structs.astuple(value))
    if isinstance(value, dict):
        return "dict", [(form(key), form(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(repr(form(item)) for item in value)
    if isinstance(value, list | tuple):
        return type(value).__name__, [form(item) for item in value]
    return type(value).__name__, "nan" if isinstance(value, float) and math.isnan(value) else repr(value)


def finished(length=500):
    rng = random.Random(length)
    logs = [struct.unpack("f", struct.pack("f", -rng.random()))[0] for _ in range(length)]
    return Sample(
        index=3, group_index=1, tokens=[rng.randrange(150_000) for _ in range(length + 9)], response_length=length,
        loss_mask=[1] * length, rollout_log_probs=logs, reward=1.0, response="so " * length, metadata={"level": 2},
        status=Sample.Status.COMPLETED,
    )  # fmt: skip


def sent(sample):
    return wire.decode_sample(wire.encode_sample(sample))


def columns_of(sample):
    return {name: value for name, value in msgspec.structs.asdict(sample).items() if type(value) is PackedColumn}


def unread(sample):
    """The columns that are still bytes."""
    return {name for name, column in columns_of(sample).items() if column.data is not None}


@tried(80)
@given(samples)
@example(Sample(loss_mask=[1, 1000, -1]))
@example(Sample(tokens=[2**31], loss_mask=[0.5], rollout_log_probs=[1e39, math.inf, -math.inf, math.nan]))
@example(Sample(metadata={1: {b"k": (1, {2, 3})}}, label="\ud800", reward=True))
def test_every_sample_comes_back_as_it_was_sent(sample):
    assert form(sent(sample)) == form(sample)
    assert form(sent(sent(sample))) == form(sample)


@tried(80)
@given(samples)
@example(Sample(metadata={"$packed": "text"}, label={"deep": [{"$packed": "zA=="}]}))
@example(Sample(tokens=[1.0], loss_mask=[True], rollout_log_probs=[math.nan], remove_sample=1, reward=True))
def test_every_sample_comes_back_from_json_as_it_was(sample):
    if type(sample.reward) is int and float(sample.reward) == sample.reward:
        sample.reward = float(sample.reward)  # the type of the field, and the same number
    text = msgspec.json.encode(sample.to_dict())
    assert form(Sample.from_dict(msgspec.json.decode(text))) == form(sample)


@tried(15)
@given(groups)
@example([[], [[]], [Sample(index=1), [Sample(index=2), Sample(index=2**70, response="\ud800")]]])
def test_groups_come_back_with_their_fan_outs(groups):
    assert form(wire.decode_groups(wire.encode_groups(groups))) == form(groups)


def packed_as(code, data):
    return msgspec.msgpack.Ext(code, data if isinstance(data, bytes) else msgspec.msgpack.encode(data))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"", "truncated"), (b"\xc1", "0xc1|invalid"), (b"\xdd\xff\xff\xff\xff", ""), (b"\x91" * 100_000, "recursion"),
        ([3], "found list instead of a map"), ({"tokens": packed_as(1, b"abc")}, "3 bytes are no whole number of i"),
        ({"tokens": packed_as(3, b"abcd")}, "tokens is packed as float32"),
        ({"label": packed_as(99, b"abcd")}, "an extension of type 99: a newer Miles"),
        ({"label": packed_as(5, ["int8", [-1, -1], b"a"])}, "1 bytes are no int8 array"),
        ({"label": packed_as(5, ["int8", "abc", b"a"])}, r"not \[dtype, shape, data\]"),
        ({"label": packed_as(5, ["O", [1], b"a"])}, "an array of 'O'"),
        ({"label": packed_as(16, 3)}, "a tuple that is no array"), ({"label": packed_as(17, [[1]])}, "unhashable"),
        ({"label": packed_as(20, b"\xff")}, "decode"), ({"status": ["pending"]}, r"status is \['pending'\]"),
        ({"status": "odd"}, "status is 'odd'"), ({"extra": {1: 2}}, "no map of attributes"), ({"extra": 3}, "no map"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_sample_are_refused_in_words(message, problem):
    data = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    with pytest.raises(WireError, match=f"not a sample: .*({problem})"):
        wire.decode_sample(data)
    with pytest.raises(WireError):
        wire.decode_groups(b"\x91\x91" + data)


def test_groups_that_are_no_lists_are_refused_by_their_place():
    for message, problem in (
        ({}, "not groups of samples: found dict"),
        ([[], 3], "group 1: found int instead of a list"),
        ([[{}, [{}, 4]]], "group 0, sample 1, part 1: found int instead of a map"),
    ):
        with pytest.raises(WireError, match=problem):
            wire.decode_groups(msgspec.msgpack.encode(message))


@tried(600)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_sample_or_a_wire_error(data):
    for decode in (wire.decode_sample, wire.decode_groups):
        try:
            found = decode(data)
        except WireError:
            continue
        assert isinstance(found, Sample | list)


@tried(80)
@given(samples, st.lists(st.tuples(st.integers(0), st.binary(max_size=3)), min_size=1, max_size=5))
def test_a_sample_with_changed_bytes_is_read_or_refused(sample, changes):
    data = bytearray(wire.encode_sample(sample))
    for place, new in changes:
        at = place % len(data) if data else 0
        data[at : at + len(new)] = new
    try:
        found = wire.decode_sample(bytes(data))
    except WireError:
        return
    form(found)


def test_nobody_unpacks_a_column_that_nobody_reads():
    sample = sent(finished())
    assert unread(sample) == {"tokens", "loss_mask", "rollout_log_probs"}
    before = {name: column.data for name, column in columns_of(sample).items()}
    again = sent(sample)
    copied = [copy.copy(sample), copy.deepcopy(sample), pickle.loads(pickle.dumps(sample)), again]
    assert all(unread(one) == unread(sample) for one in copied)
    assert {name: column.data for name, column in columns_of(again).items()} == before
    assert wire.encode_sample(again) == wire.encode_sample(finished())


def test_an_untouched_column_is_passed_on_bit_by_bit():
    signalling_nan = b"\x01\0\x80\x7f"  # reading it as a number would set a bit
    data = msgspec.msgpack.encode({"rollout_log_probs": msgspec.msgpack.Ext(3, signalling_nan)})
    sample = wire.decode_sample(data)
    assert wire.encode_sample(sample) == data
    assert math.isnan(sample.rollout_log_probs[0])


@pytest.mark.parametrize(
    "use",
    [
        copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), sent,
        lambda s: Sample.from_dict(s.to_dict()), lambda s: msgspec.convert(msgspec.to_builtins(s), Sample),
        lambda s: msgspec.json.decode(msgspec.json.encode(s), type=Sample),
        lambda s: msgspec.msgpack.decode(msgspec.msgpack.encode(s), type=Sample),
        lambda s: msgspec.json.decode(msgspec.json.encode({"deep": [s]}), type=dict[str, list[Sample]])["deep"][0],
        lambda s: msgspec.structs.replace(s, index=3), lambda s: Sample(**msgspec.structs.asdict(s)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("touched", [False, True])
def test_every_way_to_copy_a_received_sample_gives_its_lists(use, touched):
    sample = sent(finished())
    if touched:
        sample.tokens = [*sample.tokens, 7]
        sample.response_length += 1
        sample.loss_mask.append(0)
        sample.rollout_log_probs.append(-0.5)
    twin = use(sample)
    assert twin == sample
    assert sample == twin
    assert repr(twin) == repr(sample)
    assert twin.tokens[-1] == sample.tokens[-1]
    for name in ("tokens", "loss_mask", "rollout_log_probs"):
        assert type(getattr(twin, name)) is list
    twin.validate()


def test_a_received_sample_equals_the_one_that_was_sent_and_differs_from_another():
    sample, other = finished(), finished()
    other.tokens[0] += 1
    assert sent(sample) == sample
    assert repr(sent(sample)) == repr(sample)
    assert sent(sample) != other
    assert other != sent(sample)
    assert sent(other) != sent(sample)


def test_what_a_hook_changes_in_place_is_what_travels_on():
    sample = sent(finished())
    sample.tokens.append(5)
    sample.loss_mask[0] = 0
    again = sent(sample)
    assert again.tokens == [*finished().tokens, 5]
    assert again.loss_mask[0] == 0


def test_a_shallow_copy_shares_its_lists_and_a_deep_copy_does_not():
    sample = sent(finished())
    shallow, deep = copy.copy(sample), copy.deepcopy(sample)
    sample.tokens.append(5)
    assert shallow.tokens is sample.tokens
    assert wire.encode_sample(shallow) == wire.encode_sample(sample)
    late = copy.deepcopy(shallow)
    assert late.tokens == sample.tokens
    late.tokens.append(6)
    assert deep.tokens == finished().tokens
    assert sample.tokens[-1] == 5


def test_threads_that_read_a_column_at_once_get_one_list():
    for _ in range(50):
        sample, found, start = sent(finished(2000)), [], threading.Barrier(4)

        def read(sample=sample, found=found, start=start):
            start.wait()
            found.append(sample.tokens)

        threads = [threading.Thread(target=read) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len({id(tokens) for tokens in found}) == 1


def test_numbers_travel_packed_little_endian():
    message = msgspec.msgpack.decode(
        wire.encode_sample(
            Sample(tokens=[1, -2], loss_mask=[1, 0], rollout_log_probs=[-0.5, 0.1], teacher_log_probs=[-1])
        )
    )
    ext = {name: (value.code, bytes(value.data)) for name, value in message.items()}
    assert ext == {
        "tokens": (1, b"\x01\0\0\0\xfe\xff\xff\xff"),
        "loss_mask": (2, b"\x01\0"),
        "rollout_log_probs": (3, struct.pack("<ff", -0.5, 0.1)),
        "teacher_log_probs": (3, struct.pack("<f", -1)),
    }


def test_log_probs_are_rounded_to_float32_and_pickle_keeps_them_whole():
    sample = Sample(rollout_log_probs=[-0.1] * 100)
    assert sent(sample).rollout_log_probs == [struct.unpack("<f", struct.pack("<f", -0.1))[0]] * 100
    assert pickle.loads(pickle.dumps(sample)).rollout_log_probs == [-0.1] * 100


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_an_array_of_routed_experts_travels_with_type_and_shape(dtype):
    array = np.arange(48).astype(dtype).reshape(2, 4, 6)[:, ::2]
    again = sent(sent(Sample(rollout_routed_experts=array))).rollout_routed_experts
    assert again == ArrayBlob(dtype, (2, 2, 6), array.tobytes())
    assert np.asarray(again).dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(again), array)
    assert memoryview(again.data).nbytes == array.nbytes


def test_an_array_blob_whose_bytes_do_not_fit_its_shape_is_refused():
    with pytest.raises(WireError, match=r"3 bytes are no int32 array of shape \(2,\)"):
        ArrayBlob("int32", (2,), b"abc")
    with pytest.raises(WireError, match="1 bytes are no int8 array"):
        ArrayBlob("int8", (-1, -1), b"a")
    with pytest.raises(WireError, match="complex64"):
        ArrayBlob("complex64", (), b"")


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "builtins.object"), (Colour.RED, "Colour"), (np.zeros(3), "numpy.ndarray"),
        (datetime.datetime(2020, 1, 1), "datetime.datetime"), (lambda: 1, "function"),
        (Sample(), "Sample"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", [wire.encode_sample, Sample.to_dict, lambda s: wire.encode_groups([[Sample(), [s]]])])
def test_what_cannot_travel_is_refused_by_sample_attribute_and_type(value, kind, way):
    sample = finished()
    sample.my_note = {"deep": [value]}
    with pytest.raises(WireError, match=rf"sample 3 \(group 1\): .*my_note.*deep.*{kind}"):
        way(sample)
    del sample.my_note
    sample.metadata["env"] = value
    with pytest.raises(WireError, match=rf"sample 3 \(group 1\): metadata\['env'\] holds a .*{kind}"):
        way(sample)


def test_a_value_that_contains_itself_is_refused():
    sample = finished()
    sample.metadata["me"] = sample.metadata
    for way in (wire.encode_sample, Sample.to_dict):
        with pytest.raises(WireError, match=r"sample 3.*metadata is nested too deeply"):
            way(sample)


def test_a_status_that_does_not_exist_is_refused_where_it_is_sent():
    with pytest.raises(WireError, match=r"sample 3.*status is 'done', not one of pending"):
        wire.encode_sample(Sample(index=3, status="done"))
    assert sent(Sample(status="completed")).status is Sample.Status.COMPLETED


def test_an_array_of_a_type_that_nobody_can_read_is_refused():
    with pytest.raises(WireError, match=r"sample 3.*rollout_routed_experts holds an array of buffer format 'Zf'"):
        wire.encode_sample(Sample(index=3, rollout_routed_experts=np.zeros(3, "complex64")))


class Text(str):
    __slots__ = ()


def test_numpy_scalars_and_subclasses_of_text_in_metadata_travel_as_plain_values():
    values = {"a": np.float32(0.5), "b": [np.int64(3)], "c": np.bool_(True), "d": np.str_("x"), "e": Text("y")}
    for again in (sent(Sample(metadata=values)), Sample.from_dict(Sample(metadata=values).to_dict())):
        assert form(again.metadata) == form({"a": 0.5, "b": [3], "c": True, "d": "x", "e": "y"})


def test_something_else_in_place_of_a_sample_is_refused():
    for encode, value in ((wire.encode_sample, {"tokens": []}), (wire.encode_groups, [["text"]])):
        with pytest.raises(WireError, match="where a Sample belongs"):
            encode(value)


def test_a_field_of_a_later_version_is_left_out_and_a_missing_one_gets_its_default():
    data = msgspec.msgpack.encode({"index": 4, "of_the_future": [1], "spec_info": {"spec_verify_ct": 2, "new": 1}})
    assert wire.decode_sample(data) == Sample(index=4, spec_info=Sample.SpecInfo(spec_verify_ct=2))


def test_nothing_but_fields_that_differ_from_their_defaults_is_sent():
    assert wire.encode_sample(Sample()) == b"\x80"
    assert set(msgspec.msgpack.decode(wire.encode_sample(Sample(index=0, loss_mask=[])))) == {"index", "loss_mask"}
