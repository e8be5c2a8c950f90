import gzip
import json
import os
import pickle
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_api import Sample
from miles_api.errors import ConfigError, DataError, WireError
from miles_api.packing.packed import PackedColumn
from miles_api.record import (
    SCHEMA,
    DumpHeader,
    DumpWriter,
    RecordedGroup,
    RecordedRollout,
    RecordedTrainBatch,
    read_dump,
)

MAGIC = b"\x89MILES\r\n"
MORE = float(os.environ.get("MILES_EXAMPLES", "1"))
"""How many times as many examples: the whole suite has seconds, a search for the odd one has minutes."""


def tried(examples):
    return settings(deadline=None, max_examples=round(examples * MORE), suppress_health_check=list(HealthCheck))


def a_header(kind="rollout", **others):
    config = {"n_samples_per_prompt": 2, "rollout_stop": ("a", "b")}
    return DumpHeader(kind=kind, config=config, tokenizer="models/tiny", **others)


def a_sample(index, length=6):
    return Sample(
        index=index, group_index=index // 2, tokens=list(range(length + 3)), response_length=length, reward=0.5,
        loss_mask=[1] * length, rollout_log_probs=[-0.5] * length, metadata={"bytes": b"\0", 3: (1, 2)},
    )  # fmt: skip


def a_rollout(number, length=6):
    group = [a_sample(2 * number, length), [a_sample(2 * number + 1, length), a_sample(2 * number + 1, length)]]
    return RecordedRollout(
        rollout_id=number, weight_version=str(number), groups=[RecordedGroup(group), RecordedGroup([], "no spread")],
        raw_rewards=[0.5, 0.5, 0.5], rewards=[0.0, 0.0, 0.0], metrics={"rollout/seconds": 1.5},
    )  # fmt: skip


def a_dump(path, count=3, **others):
    with DumpWriter(path, a_header(), **others) as writer:
        for number in range(count):
            writer.write(a_rollout(number))
    return path


def by_hand(path, *payloads, magic=MAGIC):
    """Frames as another writer would put them."""
    data = magic
    for one in payloads:
        payload = one if isinstance(one, bytes) else msgspec.msgpack.encode(one)
        head = struct.pack("<QI", len(payload), zlib.crc32(payload))
        data += head + struct.pack("<I", zlib.crc32(head)) + payload
    path.write_bytes(data)
    return path


def ends_of_frames(path):
    data, at, ends = path.read_bytes(), len(MAGIC), []
    while at < len(data):
        at += 16 + struct.unpack_from("<Q", data, at)[0]
        ends.append(at)
    return ends


def test_a_dump_gives_back_header_and_records(tmp_path):
    dump = read_dump(a_dump(tmp_path / "new" / "rollouts.dump"))
    assert dump.header == a_header()
    assert (dump.header.schema, dump.header.abi) == (SCHEMA, (1, 0))
    assert list(dump) == [a_rollout(number) for number in range(3)]
    assert dump.damage is None
    assert list(dump) == [a_rollout(number) for number in range(3)]


def test_the_columns_of_read_samples_are_unpacked_when_they_are_read(tmp_path):
    record = next(iter(read_dump(a_dump(tmp_path / "dump"))))
    sample = record.groups[0].samples[0]
    assert type(msgspec.structs.asdict(sample)["tokens"]) is PackedColumn
    assert sample.tokens == list(range(9))


def test_a_record_can_be_read_while_the_dump_is_still_written(tmp_path):
    writer = DumpWriter(tmp_path / "dump", a_header())
    assert list(read_dump(tmp_path / "dump")) == []
    writer.write(a_rollout(0))
    assert list(read_dump(tmp_path / "dump")) == [a_rollout(0)]
    writer.close()
    writer.close()


def test_a_training_batch_comes_back_as_plain_lists(tmp_path):
    columns = {
        "tokens": [[1, 2, 3], [2**40]], "advantages": [[0.1, -2.5], [0.25]], "rewards": [1.0, float("inf")],
        "loss_masks": [[1.0, 0.0], [True]], "metadata": [{"a": (1,)}, None], "empty": [[], []], "scalar": 3,
        "mixed": [[1, 2.5], ["x", 1]], "huge": [[1e39], [0.5, None]],
    }  # fmt: skip
    with DumpWriter(tmp_path / "dump", a_header("train")) as writer:
        writer.write(RecordedTrainBatch(7, columns))
    (record,) = read_dump(tmp_path / "dump")
    assert record == RecordedTrainBatch(7, columns)
    assert repr(record) == repr(RecordedTrainBatch(7, columns))
    assert {type(entry) for name in ("tokens", "advantages", "loss_masks") for entry in record.columns[name]} == {list}


def test_numbers_and_text_beyond_msgpack_travel_in_records_too(tmp_path):
    record = RecordedRollout(1, groups=[RecordedGroup([Sample(index=2**70, response="\ud800")], dropped="\ud800")])
    with DumpWriter(tmp_path / "dump", a_header()) as writer:
        writer.write(record)
    assert list(read_dump(tmp_path / "dump")) == [record]


def test_a_dump_of_rollouts_takes_no_training_batch(tmp_path):
    with DumpWriter(tmp_path / "dump", a_header()) as writer, pytest.raises(WireError, match="rollout dump: it cannot"):
        writer.write(RecordedTrainBatch(0, {}))


def test_a_record_that_cannot_travel_leaves_the_file_as_it_was(tmp_path):
    with DumpWriter(tmp_path / "dump", a_header()) as writer:
        writer.write(a_rollout(0))
        bad = a_rollout(1)
        bad.groups[0].samples[0].env = object()
        with pytest.raises(WireError, match=r"sample 2 \(group 1\): .*env.* holds a builtins.object"):
            writer.write(bad)
        bad = a_rollout(1)
        bad.metrics["x"] = np.zeros(2)
        with pytest.raises(WireError, match=r"rollout 1: metrics\['x'\] holds a numpy.ndarray"):
            writer.write(bad)
        writer.write(a_rollout(2))
    assert list(read_dump(tmp_path / "dump")) == [a_rollout(0), a_rollout(2)]


@pytest.mark.parametrize("lost", [1, 15, 100])
def test_a_dump_that_ends_too_early_is_read_to_the_last_whole_record(tmp_path, lost):
    path = a_dump(tmp_path / "dump")
    path.write_bytes(path.read_bytes()[:-lost])
    dump = read_dump(path)
    assert list(dump) == [a_rollout(0), a_rollout(1)]
    assert dump.damage.startswith(f"{path} ends within record 3: its writer was stopped")
    assert "2 whole records stand before it" in dump.damage


def test_a_changed_byte_is_told_from_an_early_end(tmp_path):
    path = a_dump(tmp_path / "dump")
    whole, ends = path.read_bytes(), ends_of_frames(path)
    for at in (ends[1], ends[1] + 7, ends[1] + 9, ends[1] + 13, ends[1] + 30, ends[2] - 1):
        data = bytearray(whole)
        data[at] ^= 0x55
        path.write_bytes(data)
        dump = read_dump(path)
        assert list(dump) == [a_rollout(0)]
        lost = len(whole) - ends[1]
        assert dump.damage == (
            f"{path} is damaged in record 2, at byte {ends[1]}: the checksum does not match; "
            f"1 whole record stands before it, the last {lost} bytes of the file are lost"
        )


def test_a_length_beyond_the_file_takes_no_memory(tmp_path):
    path = a_dump(tmp_path / "dump", 1)
    head = struct.pack("<QI", 1 << 60, 0)
    with path.open("ab") as file:
        file.write(head + struct.pack("<I", zlib.crc32(head)) + b"rest")
    dump = read_dump(path)
    assert list(dump) == [a_rollout(0)]
    assert "ends within record 2" in dump.damage


def test_appending_to_a_dump_cuts_off_what_a_crash_left(tmp_path):
    path = a_dump(tmp_path / "dump", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with DumpWriter(path, a_header(), append=True) as writer:
        assert "ends within record 2" in writer.damage
        writer.write(a_rollout(7))
    dump = read_dump(path)
    assert list(dump) == [a_rollout(0), a_rollout(7)]
    assert dump.damage is None


def test_appending_to_a_whole_dump_adds_to_it_and_not_appending_replaces_it(tmp_path):
    path = a_dump(tmp_path / "dump", 2)
    a_dump(path, 1, append=True)
    assert [record.rollout_id for record in read_dump(path)] == [0, 1, 0]
    a_dump(path, 1)
    assert [record.rollout_id for record in read_dump(path)] == [0]
    a_dump(tmp_path / "fresh", 1, append=True)
    assert [record.rollout_id for record in read_dump(tmp_path / "fresh")] == [0]


def test_a_crash_within_the_header_is_begun_anew(tmp_path):
    path = a_dump(tmp_path / "dump", 1)
    whole = path.read_bytes()
    for size in (0, 3, len(MAGIC), len(MAGIC) + 9, len(MAGIC) + 40):
        path.write_bytes(whole[:size])
        a_dump(path, 1, append=True)
        assert path.read_bytes() == whole


def test_appending_never_touches_what_is_no_dump_of_its_kind(tmp_path):
    path = tmp_path / "dump"
    broken = bytearray(a_dump(tmp_path / "other", 1).read_bytes())
    broken[30] ^= 1
    with DumpWriter(tmp_path / "train", a_header("train")):
        pass
    for data, problem in (
        (b"something else entirely", "it is no dump of Miles"),
        (bytes(broken), "damaged in its header"),
        ((tmp_path / "train").read_bytes(), "it is a train dump, not a rollout dump"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=problem):
            DumpWriter(path, a_header(), append=True)
        assert path.read_bytes() == data


def test_an_older_writer_is_read_with_defaults(tmp_path):
    sample = {"index": 1, "tokens": [1, 2]}
    path = by_hand(
        tmp_path / "old",
        {"schema": 1},
        {"type": "rollout", "rollout_id": 4, "groups": [{"samples": [sample]}]},
        {"type": "train", "rollout_id": 5},
    )
    dump = read_dump(path)
    assert dump.header == DumpHeader()
    expected = RecordedRollout(4, groups=[RecordedGroup([Sample(index=1, tokens=[1, 2])])])
    assert list(dump) == [expected, RecordedTrainBatch(5, {})]


def test_a_newer_writer_of_the_same_schema_is_read_without_what_is_new(tmp_path):
    sample = {"index": 1, "new_field": {"x": 1}}
    path = by_hand(
        tmp_path / "new",
        {"schema": 1, "kind": "rollout", "abi": [1, 9], "miles_api": "1.7", "host": "a", "config": {}, "tokenizer": ""},
        {"type": "rollout", "rollout_id": 4, "host": 1, "groups": [{"samples": [sample, [sample]], "why": 2}]},
        {"type": "of the future", "rollout_id": 4},
        {"type": "rollout", "rollout_id": 5, "groups": []},
    )
    dump = read_dump(path)
    assert dump.header.abi == (1, 9)
    first, second = dump
    assert first == RecordedRollout(4, groups=[RecordedGroup([Sample(index=1), [Sample(index=1)]])])
    assert second == RecordedRollout(5)


def test_a_newer_schema_is_refused_with_both_versions(tmp_path):
    path = by_hand(tmp_path / "new", {"schema": 2, "kind": ["of another type"], "miles_api": "2.0"})
    message = rf"{path} was written by Miles 2.0 in dump schema 2; this one reads up to {SCHEMA}"
    with pytest.raises(DataError, match=message):
        read_dump(path)
    with pytest.raises(DataError, match=message):
        DumpWriter(path, a_header(), append=True)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1", b"", [], {"rollout_id": 1}, {"type": 3}, {"type": ["rollout"]}, {"type": "rollout"},
        {"type": "rollout", "rollout_id": "x"}, {"type": "rollout", "rollout_id": 1, "groups": [[]]},
        {"type": "rollout", "rollout_id": 1, "groups": [{"samples": [{"status": "odd"}]}]},
        {"type": "rollout", "rollout_id": 1, "groups": [{}]}, {"type": "train", "rollout_id": 1, "columns": []},
    ],
)  # fmt: skip
def test_a_whole_record_that_makes_no_sense_is_an_error_naming_file_and_record(tmp_path, payload):
    path = by_hand(tmp_path / "odd", {"schema": 1}, {"type": "rollout", "rollout_id": 0}, payload)
    records = iter(read_dump(path))
    assert next(records) == RecordedRollout(0)
    with pytest.raises(DataError, match=f"{path}: record 2, although undamaged"):
        next(records)


def test_a_header_that_makes_no_sense_is_an_error_naming_the_file(tmp_path):
    for header in ([], {"schema": "x"}, {"schema": 1, "kind": "other"}, b"\xc1", {"schema": 1, "abi": [1]}):
        path = by_hand(tmp_path / "odd", header)
        with pytest.raises(DataError, match=f"{path} has a header that makes no sense"):
            read_dump(path)


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")


@pytest.mark.parametrize(
    ("write", "looks"),
    [
        (_zip, "a zip archive, which is what torch.save writes"),
        (lambda path: path.write_bytes(pickle.dumps([1])), "a pickle"),
        (lambda path: path.write_text(json.dumps({"a": 1})), "JSON"),
        (lambda path: path.write_bytes(gzip.compress(b"x")), "a gzip archive"),
        (lambda path: path.write_text("prompt,label\n"), "it begins with b'prompt,l'"),
        (lambda path: path.write_bytes(b""), "it is empty"),
    ],
)
def test_something_else_than_a_dump_is_named_for_what_it_looks_like(tmp_path, write, looks):
    write(tmp_path / "file")
    with pytest.raises(DataError, match=f"{tmp_path}/file is no dump of Miles: .*{looks}"):
        read_dump(tmp_path / "file")


def test_a_missing_file_and_a_directory_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_dump(tmp_path / "none")
    with pytest.raises(DataError, match="Is a directory"):
        read_dump(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        DumpWriter(tmp_path / "file" / "dump", a_header())


def test_a_dump_cut_off_within_its_header_is_a_data_error(tmp_path):
    path = a_dump(tmp_path / "dump", 1)
    whole = path.read_bytes()
    for size in (len(MAGIC), len(MAGIC) + 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="ends within its header"):
            read_dump(path)


def test_a_path_with_a_placeholder_is_refused_with_the_reason(tmp_path):
    for use in (read_dump, lambda path: DumpWriter(path, a_header())):
        with pytest.raises(ConfigError, match="one file for all rollouts of a run"):
            use(tmp_path / "{rollout_id}.pt")


def test_an_option_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(WireError, match=r"header: config\['reward'\] holds a builtins.object"):
        DumpWriter(tmp_path / "dump", DumpHeader(config={"reward": object()}))


def test_reading_holds_one_record_at_a_time(tmp_path):
    with DumpWriter(tmp_path / "dump", a_header()) as writer:
        for number in range(20):
            writer.write(a_rollout(number, length=20_000))
    size = (tmp_path / "dump").stat().st_size
    tracemalloc.start()
    count = sum(1 for _ in read_dump(tmp_path / "dump"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20
    assert peak < size / 4


records = st.builds(
    RecordedRollout,
    rollout_id=st.integers(0, 99),
    weight_version=st.text(max_size=3),
    evaluation=st.booleans(),
    groups=st.lists(
        st.builds(
            RecordedGroup,
            samples=st.lists(st.builds(a_sample, st.integers(0, 9), st.integers(0, 9)), max_size=2),
            dropped=st.none() | st.text(max_size=5),
        ),
        max_size=2,
    ),
    rewards=st.none() | st.lists(st.floats(allow_nan=False), max_size=3),
    metrics=st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False), max_size=3),
)


@tried(60)
@given(st.lists(records, max_size=4))
def test_any_records_come_back(recorded):
    with tempfile.TemporaryDirectory() as folder:
        with DumpWriter(Path(folder, "dump"), a_header()) as writer:
            for record in recorded:
                writer.write(record)
        dump = read_dump(Path(folder, "dump"))
        assert list(dump) == recorded
        assert dump.damage is None


def read_whatever(path):
    """Read what can be read: never anything but records, words and `DataError`."""
    try:
        dump = read_dump(path)
        found = list(dump)
    except DataError as error:
        return [], str(error)
    return found, dump.damage


@tried(150)
@given(st.data())
def test_a_dump_with_changed_or_missing_bytes_gives_a_true_beginning_and_words(data):
    with tempfile.TemporaryDirectory() as folder:
        path = a_dump(Path(folder, "dump"))
        whole, ends = path.read_bytes(), ends_of_frames(path)
        at = data.draw(st.integers(0, len(whole) - 1))
        new = data.draw(st.binary(min_size=1, max_size=30))
        changed = whole[:at] + data.draw(st.sampled_from([b"", new + whole[at + len(new) :], new + whole[at:]]))
        path.write_bytes(changed)
        found, words = read_whatever(path)
        assert found == [a_rollout(number) for number in range(len(found))]
        untouched = sum(end <= at for end in ends)
        assert len(found) >= untouched - 1
        assert words or changed[: ends[-1]] == whole or len(found) == untouched - 1


@tried(150)
@given(st.binary(max_size=80), st.sampled_from([b"", MAGIC]), st.booleans())
def test_any_file_is_read_or_refused_in_words(data, magic, framed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dump")
        if framed:
            by_hand(path, {"schema": 1}, data, magic=MAGIC)
        else:
            path.write_bytes(magic + data)
        found, words = read_whatever(path)
        assert found == []
        assert words
