"""Damaged and odd files of JSON Lines: read rightly, or an error that names file and line."""

import gzip

import pytest

from tasks import DataError, json_lines
from tasks.json_lines import read_json_lines

GOOD = b"\n".join(b'{"goal": "reach goal %d", "label": %d}' % (i, i % 2) for i in range(600)) + b"\n"
ZIPPED = gzip.compress(GOOD, mtime=0)  # the same bytes in every worker, which name the tests


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF, content[place + 1] ^ 0xFF]) + content[place + 2 :]


@pytest.mark.parametrize("content", [
    b"", ZIPPED[:-200], ZIPPED[:5], ZIPPED[:-4], flipped(ZIPPED, len(ZIPPED) // 2), flipped(ZIPPED, len(ZIPPED) - 8),
    flipped(ZIPPED, 12), b"version https://git-lfs.github.com/spec/v1\n", GOOD, gzip.compress(b"", mtime=0),
    gzip.compress(b"\n \n", mtime=0), ZIPPED + b"garbage",
])  # fmt: skip
def test_a_damaged_or_empty_gzip_file_is_named(tmp_path, content):
    path = tmp_path / "piqa_train.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"piqa_train.jsonl.gz is (broken|empty)"):
        read_json_lines(path)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + GOOD, GOOD.replace(b"\n", b"\r\n"), GOOD + b"\n\n", GOOD.replace(b"\n", b"\n\n", 1), GOOD[:-1],
])  # fmt: skip
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    plain, zipped = read_json_lines(tmp_path / "a.jsonl"), read_json_lines(tmp_path / "a.jsonl.gz")
    assert plain == zipped and len(plain) == 600
    assert plain[599][1] == {"goal": "reach goal 599", "label": 1}
    assert plain[0][0] == 1 and plain[1][0] == (3 if b"\n\n" in content[:200] else 2)


@pytest.mark.parametrize("line, problem", [
    (b"{", "not JSON"), (b"[1, 2]", "not a JSON object"), (b"null", "not a JSON object"), (b'"text"', "not a JSON"),
    (b'{"a": NaN}', "NaN is no number of JSON"), (b'{"a": [-Infinity]}', "-Infinity is no number"),
    (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"), (b'{"o": {"A": "x", "A": "y"}}', "the key 'A' appears"),
    (b'{"a": "r\xe9ach"}', "not UTF-8"), (b'{"a": 1} {"a": 2}', "not JSON"), (b"{'a': 1}", "not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"), (b'{"a": ' * 100_000, "recursion"),
    ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
])  # fmt: skip
def test_a_line_that_is_not_one_object_is_named(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"a.jsonl, line 3: .*{problem}"):
        read_json_lines(path)


def test_line_separators_within_a_text_do_not_end_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "a.jsonl") == [(1, {"a": "x\u2028y\x85z"})]


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    path = tmp_path / "piqa_train.jsonl.gz"
    line = b'{"a": "' + b" " * (1 << 20) + b'"}\n'
    path.write_bytes(gzip.compress(line) * 4000)  # four gigabytes
    assert path.stat().st_size < 5 << 20
    read, sizes = gzip.GzipFile.read, []

    def count(self, size):
        sizes.append(size)
        return read(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", count)
    monkeypatch.setattr(json_lines, "MIN_LIMIT", 1 << 20)
    monkeypatch.setattr(json_lines, "MAX_RATIO", 2)
    with pytest.raises(DataError, match=r"piqa_train.jsonl.gz unpacks to more than \d+ MB, over 2 times its size"):
        read_json_lines(path)
    assert sum(sizes) < 20 << 20
    path.write_bytes(gzip.compress(GOOD))
    assert len(read_json_lines(path)) == 600
