"""Files of every kind, cut into units and read: the same rows however they are stored and cut, and one reject for one bad row."""

import datetime
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data import files
from nemotron_nb.data.files import FILE_REJECTS, BadJson, Reject, file_format, parse_json, read_unit, units

BOM = b"\xef\xbb\xbf"
# Arguments with different keys, as tools have them: a table gives every row all of them.
ROWS = [
    {"messages": [{"role": "user", "content": f"q{n} é\u2028"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": a}]}], "n": n}
    for n, a in enumerate([{"city": "Oslo"}, {"unit": {"of": "C"}}, {"days": [1, 2]}, {"city": "Rome", "days": [3]}, {"unit": {"to": "F"}}] * 4)
]
LINES = "".join(json.dumps(r, ensure_ascii=n % 2 == 0) + "\n" for n, r in enumerate(ROWS)).encode()


def read(path, unit_bytes=files.UNIT_BYTES, **more):
    return [row for unit in units(path, unit_bytes) for row in read_unit(unit, **more)]


def values(path, *more):
    return [value for _, value in read(path, *more)]


def reasons(rows):
    return [value.reason for _, value in rows if isinstance(value, Reject)]


def written(folder, data, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(data)
    return path


# ---- cutting


def naive_rows(data, limit=1 << 30):
    """The rows of a file with lines, the plain way: the whole file, split and parsed."""
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if not line or line.isspace():
            continue
        try:
            yield number, parse_json(line.rstrip(b"\r")) if len(line) < limit else "line_too_long"
        except BadJson as e:
            yield number, e.reason


line = st.sampled_from([b"", b" ", b"1", b'{"a": 1}', b'{"a": 1, "a": 2}', b"[1, 2, 3]", b"{", b"\xff", b'"' + b"long " * 20 + b'"', '"é"'.encode()])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"", BOM]), st.lists(st.tuples(line, st.sampled_from([b"\n", b"\r\n"])), min_size=1, max_size=30), st.booleans(), st.integers(1, 200), st.integers(2, 64))
def test_units_of_lines_are_the_file_and_its_rows(tmp_path_factory, mark, lines, ends_in_a_line_break, unit_bytes, block):
    """Cut anywhere, with blocks that are smaller than a line or a unit: the same bytes, numbers and rows; no unit is larger than it must be."""
    data = mark + b"".join(a + b for a, b in lines)
    data = data if ends_in_a_line_break else data.rstrip(b"\r\n") or b"1"
    path = written(tmp_path_factory.getbasetemp(), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK", block)
        pieces = units(path, unit_bytes)
        rows = [(n, getattr(v, "reason", v)) for u in pieces for n, v in read_unit(u)]
    contents = [data[u.start : u.end] for u in pieces]
    assert b"".join(contents) == data and all(c.endswith(b"\n") for c in contents[:-1])
    assert all(len(c) >= unit_bytes > c.rfind(b"\n", 0, -1) + 1 for c in contents[:-1])
    assert [u.first_line for u in pieces] == [1 + data[: u.start].count(b"\n") for u in pieces]
    assert [u.digest for u in pieces] == [hashlib.sha256(c).hexdigest() for c in contents]
    assert rows == list(naive_rows(data))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 50))
def test_a_long_line_is_one_reject_and_the_next_line_is_read(tmp_path_factory, lengths, limit):
    path = written(tmp_path_factory.getbasetemp(), b"\n".join(b'"%s"' % (b"x" * n) for n in lengths))
    expected = [(i, "x" * n) if n + 2 <= limit else (i, "line_too_long") for i, n in enumerate(lengths, 1)]
    assert [(n, getattr(v, "reason", v)) for n, v in read(path, 32, max_line_bytes=limit)] == expected


def test_a_long_line_is_not_held_in_memory(tmp_path):
    path = written(tmp_path, b'{"n": 1}\n"' + b"x" * 40_000_000 + b'"\n{"n": 2}\n')
    tracemalloc.start()
    rows = read(path, max_line_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [rows[0], rows[2]] == [(1, {"n": 1}), (3, {"n": 2})] and reasons(rows) == ["line_too_long"] and "40,000,003 bytes" in rows[1][1].detail
    assert peak < 8 << 20


# ---- one row of JSON

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v, max_size=4), max_leaves=15)


@settings(max_examples=300, deadline=None)
@given(json_values, st.booleans(), st.sampled_from([None, 1]))
def test_json_means_what_json_means(value, ascii_only, indent):
    """Whole numbers of any size, fractions to the last bit, every character."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert repr(parse_json(text.encode())) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (b'{"a": NaN}', "not_json", "NaN"),
        (b"[-Infinity]", "not_json", "Infinity"),
        (b"[1e999]", "not_json", "1e999"),
        (b"[" + b"7" * 5000 + b"]", "not_json", "digits"),
        (b"[1,]", "not_json", "column"),
        (b'"a\x01"', "not_json", "control"),
        (b"", "not_json", "column 1"),
        (b"{} {}", "not_json", "Extra"),
        (b'{"a": {"key": 1, "b": 2, "key": 1}}', "duplicate_key", "'key'"),
        (b'["\\ud83d"]', "not_unicode", "ud83d"),
        (b'{"\\uDE00\\uD83D": 1}', "not_unicode", "ude00"),
        (b'"\xed\xa0\xbd"', "not_utf8", "byte 1"),
        (b"[" * 101 + b"]" * 101, "too_deep", "100"),
        (b'{"a":' * 100_000, "too_deep", "100"),
    ],
)
def test_what_json_would_let_pass_is_refused_by_name(data, reason, says):
    with pytest.raises(BadJson) as error:
        parse_json(data)
    assert error.value.reason == reason and says in error.value.detail


def test_what_looks_like_a_fault_and_is_none():
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud83d", "NaN", "{\\"a\\":1, \\"a\\":2}"]') == ["\U0001f600", "\\ud83d", "NaN", '{"a":1, "a":2}']
    assert parse_json(b"[" * 100 + b"]" * 100) and parse_json(json.dumps("[" * 500)) == "[" * 500


def test_a_word_nobody_has_explained_cannot_be_used():
    with pytest.raises(KeyError):
        BadJson("because", "it looks wrong")


# ---- formats


def parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def arrow(path, as_file):
    table = pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def zst(*parts):
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(p) for p in parts)


HALF = LINES.find(b"\n", len(LINES) // 2) + 1
ARRAY = json.dumps(ROWS, indent=2).encode()
FORMATS = {
    "rows.jsonl": ("jsonl", lambda p: p.write_bytes(BOM + LINES)),
    "rows.ndjson": ("jsonl", lambda p: p.write_bytes(LINES.replace(b"\n", b"\r\n").rstrip())),
    "disguised.json": ("jsonl", lambda p: p.write_bytes(LINES)),
    "array.json": ("json", lambda p: p.write_bytes(BOM + ARRAY)),
    "array_in_a_line.json": ("json", lambda p: p.write_bytes(json.dumps(ROWS).encode())),
    "one_by_one.json": ("json", lambda p: p.write_bytes("\n".join(json.dumps(r, indent=1) for r in ROWS).encode())),
    "rows.jsonl.gz": ("jsonl.gz", lambda p: p.write_bytes(gzip.compress(LINES[:HALF]) + gzip.compress(LINES[HALF:]))),
    "array.json.gz": ("json.gz", lambda p: p.write_bytes(gzip.compress(ARRAY))),
    "rows.jsonl.zst": ("jsonl.zst", lambda p: p.write_bytes(zst(LINES[:HALF], LINES[HALF:]))),
    "array.json.zst": ("json.zst", lambda p: p.write_bytes(zst(ARRAY))),
    "rows.parquet": ("parquet", parquet),
    "stream.arrow": ("arrow", lambda p: arrow(p, as_file=False)),
    "file.arrow": ("arrow", lambda p: arrow(p, as_file=True)),
    "rows.feather": ("arrow", lambda p: pa.feather.write_feather(pa.Table.from_pylist(ROWS), p)),
    "blob_lines": ("jsonl", lambda p: p.write_bytes(LINES)),
    "blob_packed": ("jsonl.gz", lambda p: p.write_bytes(gzip.compress(LINES))),
    "blob_columns": ("parquet", parquet),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_in_every_format_and_cut(tmp_path, name):
    path = tmp_path / name
    expected, write = FORMATS[name]
    write(path)
    assert file_format(path) == expected and {u.format for u in units(path)} == {expected}
    rows = read(path)
    assert [v for _, v in rows] == ROWS and [n for n, _ in rows] == list(range(1, 21))
    for unit_bytes in (1, 1000):
        pieces = units(path, unit_bytes)
        assert [row for u in pieces for row in read_unit(u)] == rows == [row for u in reversed(pieces) for row in reversed(list(read_unit(u)))][::-1]
        assert len(pieces) > 1 or expected not in ("jsonl", "parquet")
        assert pieces == units(path, unit_bytes) and len({u.digest for u in pieces}) == len(pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), max_size=6), st.sampled_from([None, 0, 3]), st.integers(8, 64), st.data())
def test_an_array_is_read_through_any_window_and_up_to_any_cut(tmp_path_factory, rows, indent, block, data):
    """The window is smaller than most rows. Cut short, the rows before the cut are there, and one reject names the next."""
    text = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK", block)
        anything = [v for row in rows for v in row.values()]
        path = written(tmp_path_factory.getbasetemp(), json.dumps(anything, indent=indent).encode(), "rows.json")
        assert repr(values(path)) == repr(anything)
        path.write_bytes(text)
        assert repr(values(path)) == repr(rows)
        path.write_bytes(text[: data.draw(st.integers(1, max(1, len(text) - 1)), label="cut")])
        got = read(path)
    assert repr([v for _, v in got[:-1]]) == repr(rows[: len(got) - 1])
    assert reasons(got) == ["truncated_file"] and got[-1][0] == len(got)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, {"a": 1, "a": 2}, {"a": 3}]', [{"a": 1}, "duplicate_key", {"a": 3}]),
        (b'[{"a": 1}, {"a": "\xff"}, {"a": 3}]', [{"a": 1}, "not_utf8", {"a": 3}]),
        ('[{"a": 1}, {a: 2}, {"a": "a tail that is long enough"}]', [{"a": 1}, "not_json"]),
        ('[{"a": 1} {"a": 2}]', [{"a": 1}, "not_json"]),
        ('[{"a": 1},]', [{"a": 1}, "not_json"]),
        ('[{"a": 1}, {a: 2}]', [{"a": 1}, "not_json"]),
        ('[{"a": 1}, nil]', [{"a": 1}, "not_json"]),
        ('[{"a": 1}, nul', [{"a": 1}, "truncated_file"]),
        ('[{"a": 1}, {"b": 1.', [{"a": 1}, "truncated_file"]),
        ('[{"a": 1}] tail', [{"a": 1}, "not_json"]),
        ("[" * 100_000, ["too_deep"]),
        ("[]", []),
    ],
)
def test_arrays_with_faults(tmp_path, text, expected):
    path = written(tmp_path, text if isinstance(text, bytes) else text.encode(), "rows.json")
    assert [getattr(v, "reason", v) for v in values(path)] == expected


# ---- damage


@pytest.mark.parametrize("pack", [gzip.compress, zst], ids=["gz", "zst"])
def test_a_truncated_file_gives_its_rows_and_one_reject(tmp_path, pack):
    rng = random.Random(0)
    rows = [{"n": n, "text": rng.randbytes(300).hex()} for n in range(1500)]
    data = pack("".join(json.dumps(r) + "\n" for r in rows).encode())
    path = tmp_path / f"rows.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    most = 0
    for cut in [12, *(len(data) * i // 8 for i in range(1, 8)), len(data) - 9, len(data) - 1]:
        path.write_bytes(data[:cut])
        got = read(path)
        assert [v for _, v in got[:-1]] == rows[: len(got) - 1]
        assert got[-1][1] == Reject(str(path), len(got), "truncated_file", got[-1][1].detail)
        most = max(most, len(got))
    assert most > 1000
    array = written(tmp_path, pack(json.dumps(rows).encode())[:-40], path.name.replace("jsonl", "json"))
    got = read(array)
    assert [v for _, v in got[:-1]] == rows[: len(got) - 1] and reasons(got) == ["truncated_file"] and len(got) > (1400 if pack is gzip.compress else 1000)


def test_damage_inside_a_compressed_file(tmp_path):
    data = gzip.compress(LINES)
    got = read(written(tmp_path, data[:-8] + bytes(8), "sum.jsonl.gz"))
    assert [v for _, v in got[:-1]] == ROWS and reasons(got) == ["damaged_file"] and got[-1][0] == 21
    assert reasons(read(written(tmp_path, data + b"no gzip", "tail.jsonl.gz"))) == ["damaged_file"]
    packed = bytearray(zst(LINES))
    packed[12:40] = bytes(28)
    assert reasons(read(written(tmp_path, bytes(packed), "rows.jsonl.zst"))) == ["damaged_file"]
    assert reasons(read(written(tmp_path, gzip.compress(ARRAY)[:-8] + bytes(8), "sum.json.gz"))) == ["damaged_file"]


def test_damage_inside_a_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path)
    column = pq.read_metadata(path).row_group(3).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    got = read(path, 1)
    assert "damaged_file" in reasons(got) and [v for _, v in got[:9]] == ROWS[:9]


# ---- columns


def test_absent_stays_absent_and_a_written_null_stays(tmp_path):
    """Arrow gives every struct all keys. Nulls in JSON text, lists and maps were written by someone."""
    mapped = pa.array([[("city", None)], []], pa.map_(pa.string(), pa.string()))
    columns = {
        "struct": pa.array([{"a": {"x": 1}}, {"a": {"y": [None, "s"]}}]),
        "text": ['{"city": null}', None],
        "map": mapped,
        "list": pa.array([[{"k": 1}], [{"j": 2}, None]]),
        "empty": pa.array([{}, None], pa.struct([])),
    }
    pq.write_table(pa.table({k: v for k, v in columns.items() if k != "empty"}), tmp_path / "rows.parquet")
    first = {"struct": {"a": {"x": 1}}, "text": '{"city": null}', "map": {"city": None}, "list": [{"k": 1}]}
    assert values(tmp_path / "rows.parquet") == [first, {"struct": {"a": {"y": [None, "s"]}}, "map": {}, "list": [{"j": 2}, None]}]


def test_a_bad_text_or_a_double_key_in_a_column_costs_one_row(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(bytes(pa.array([0, 1, 2, 3], pa.int32()).buffers()[1])), pa.py_buffer(b"a\xffc")])
    keys = pa.array([[("a", 1)], [("a", 1)], [("b", 1), ("b", 2)]], pa.map_(pa.string(), pa.int64()))
    with pa.ipc.new_file(tmp_path / "rows.arrow", pa.schema({"t": pa.string(), "m": keys.type})) as writer:
        writer.write_batch(pa.record_batch({"t": bad, "m": keys}))
    assert [(n, getattr(v, "reason", v)) for n, v in read(tmp_path / "rows.arrow")] == [(1, {"t": "a", "m": {"a": 1}}), (2, "not_utf8"), (3, "duplicate_key")]


# ---- what ends in one error


def appended(path):
    with open(path, "ab") as f:
        f.write(LINES)


def same_size(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Oslo", b"Bonn").replace(b"Rome", b"Lima"))


@pytest.mark.parametrize("change", [appended, same_size])
@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "stream.arrow"])
def test_a_file_that_changes_after_it_was_cut(tmp_path, name, change):
    FORMATS[name][1](tmp_path / name)
    pieces = units(tmp_path / name)
    change(tmp_path / name)
    with pytest.raises(UserError, match="changed"):
        [list(read_unit(u)) for u in pieces]


def test_a_parquet_file_that_is_written_anew(tmp_path):
    parquet(tmp_path / "rows.parquet")
    pieces = units(tmp_path / "rows.parquet", 1)
    parquet(tmp_path / "rows.parquet", [*ROWS[:-1], ROWS[0]])
    with pytest.raises(UserError, match="changed"):
        list(read_unit(pieces[-1]))


def test_a_file_that_grows_while_it_is_cut(tmp_path, monkeypatch):
    path, cut = written(tmp_path, LINES), files._cut

    def cut_and_append(*arguments):
        pieces = cut(*arguments)
        appended(path)
        return pieces

    monkeypatch.setattr(files, "_cut", cut_and_append)
    with pytest.raises(UserError, match="changed"):
        units(path)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.jsonl", b"", "empty"),
        ("not.parquet", LINES, "named as parquet"),
        ("cut.parquet", b"PAR1" + bytes(100), "not a readable Parquet file"),
        ("not.jsonl.gz", LINES, "named as gz"),
        ("not.zst", gzip.compress(LINES), "rename it to end in .gz"),
        ("packed.jsonl", gzip.compress(LINES), "rename it to end in .gz"),
        ("old.feather", b"FEA1" + bytes(20), "named as arrow"),
        ("table.csv", b"role,content\nuser,hi\n", "not a format that is known"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, name, data, says):
    with pytest.raises(UserError, match=says) as error:
        units(written(tmp_path, data, name))
    assert name in str(error.value) and "what to do" in str(error.value)


def test_folder_missing_file_and_pipe(tmp_path):
    written(tmp_path, LINES)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, says in [(tmp_path, "is a folder"), (tmp_path / "raws.jsonl", "no such file"), (tmp_path / "pipe.jsonl", "not a regular file")]:
        with pytest.raises(UserError, match=says) as error:
            units(path)
        assert "rows.jsonl" in str(error.value)


def test_a_file_that_may_not_be_read(tmp_path):
    path = written(tmp_path, LINES)
    path.chmod(0)
    for folder in [f for f in (tmp_path, *tmp_path.parents) if f.stat().st_uid == os.geteuid() and f.is_relative_to(tempfile.gettempdir())][:-1]:
        folder.chmod(0o755)
    user = os.geteuid()
    try:
        if user == 0:  # nothing is forbidden to root, so be nobody for a moment
            os.seteuid(65534)
        with pytest.raises(UserError, match="cannot be read"):
            units(path)
    finally:
        os.seteuid(user)


def test_zst_without_its_package_names_the_extra(tmp_path, monkeypatch):
    path = written(tmp_path, zst(LINES), "rows.jsonl.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="fast"):
        read(path)


# ---- columns: the same rules, and no trust in a table


def table_of(folder, name, columns):
    """One table as a Parquet or an Arrow file."""
    table = pa.table(columns) if isinstance(columns, dict) else columns
    if name.endswith("parquet"):
        pq.write_table(table, folder / name)
    else:
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return folder / name


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_column_says_no_more_than_json_can(tmp_path, name):
    """NaN and Infinity cost their row, a null does not; a time out of range costs its row; a doubled name costs all."""
    rows = read(table_of(tmp_path, name, {"n": [1, 2, 3, 4], "deep": [[{"x": 0.5}], [{"x": float("nan")}], [{"x": None}], [{"x": float("-inf")}]]}))
    assert [getattr(v, "reason", v) for _, v in rows] == [{"n": 1, "deep": [{"x": 0.5}]}, "not_json", {"n": 3, "deep": [{}]}, "not_json"]
    assert "nan" in rows[1][1].detail
    taken = [v for u in units(tmp_path / name) for _, v in read_unit(u, parse=json.loads)]
    assert not any(isinstance(v, Reject) for v in taken), "a parser of one's own takes NaN, in a text and in a column"
    late = table_of(tmp_path, name, {"at": pa.array([0, 1 << 62], pa.duration("s")), "n": [1, 2]})
    assert [v.reason if isinstance(v, Reject) else v["n"] for _, v in read(late)] == [1, "bad_value"]
    twice = pa.Table.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["n", "n"])
    assert reasons(read(table_of(tmp_path, "twice.arrow", twice))) == ["duplicate_key"] * 2


def test_a_table_without_rows(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        units(table_of(tmp_path, "none.parquet", {"n": pa.array([], pa.int64())}))


FUZZ = """
import random, sys
from pathlib import Path
from nemotron_nb.core import UserError
from nemotron_nb.data.files import read_unit, units
good = Path(sys.argv[1])
for seed in range(200):
    rng, data = random.Random(seed), bytearray(good.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path = good.with_name(f"flipped{good.suffix}")
    path.write_bytes(data)
    print(seed, flush=True)
    try:
        assert sum(1 for unit in units(path, 1000) for _ in read_unit(unit)) < 1000
    except UserError as error:
        assert str(path) in str(error)
"""


@pytest.mark.parametrize("name", ["rows.arrow", "rows.parquet"])
def test_flipped_bits_end_in_words(tmp_path, name):
    """200 seeds: the process lives, nothing but `UserError` leaves, and all of it takes seconds."""
    rows = [{"messages": [{"role": "user", "content": "q" * (i % 7)}], "took": datetime.timedelta(seconds=i), "score": i / 3, "tag": "xyz"[i % 3]} for i in range(40)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(3, "tag", table["tag"].dictionary_encode())
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=20, compression="none")
    else:
        table_of(tmp_path, name, table)
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path / name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"after seed {done.stdout.split()[-1:]}: {done.stderr[-2000:]}"


def test_an_offset_that_leads_outside_names_file_and_batch(tmp_path):
    """Without validation this one ends the process with signal 11, or reads what lies in memory behind the file."""
    path = table_of(tmp_path, "rows.arrow", {"text": ["abc", "def"], "n": [1, 2]})
    data = path.read_bytes()
    offsets = b"".join(i.to_bytes(4, "little") for i in (0, 3, 6))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, b"".join(i.to_bytes(4, "little") for i in (0, 3, 1 << 30))))
    [(row, reject)] = read(path)
    assert (row, reject.reason, reject.source) == (1, "damaged_file", str(path)) and "record batch" in reject.detail


# ---- nothing without end


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.gz"])
def test_blank_lines_without_end(tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "MAX_BLANK_LINES", 1000)
    blank = b"\n" * (5 << 20)
    path = written(tmp_path, gzip.compress(b'{"n": 1}\n' + blank + b'{"n": 2}\n'), name)
    begun = time.monotonic()
    rows = read(path, max_line_bytes=1 << 20)
    assert [getattr(v, "reason", v) for _, v in rows] == [{"n": 1}, "blank_lines"] and time.monotonic() - begun < 5
    few = written(tmp_path, gzip.compress(b'{"n": 1}\n' + blank[:1000] + b'{"n": 2}\n'), name)
    assert values(few) == [{"n": 1}, {"n": 2}]


def test_a_reader_tells_how_far_it_is(tmp_path):
    for path in (written(tmp_path, gzip.compress(LINES), "rows.jsonl.gz"), written(tmp_path, LINES), table_of(tmp_path, "rows.parquet", {"n": list(range(10))}), table_of(tmp_path, "rows.arrow", {"n": [1]})):
        told = []
        assert all(list(read_unit(unit, told=told.append)) for unit in units(path))
        assert sum(told) == os.path.getsize(path), path


def test_a_wide_window_is_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = written(tmp_path, packer.compress(LINES) + packer.flush(), "rows.jsonl.zst")
    with pytest.raises(UserError, match="--long"):
        read(path)


def test_every_word_of_the_table_was_seen_here():
    """The table and this file know the same words."""
    source = open(__file__, encoding="utf-8").read()
    assert [word for word in FILE_REJECTS if f'"{word}"' not in source] == []
