"""The file of buckets that a person gave."""

import json

import pytest

from curate.errors import InputError
from curate.overrides import read_overrides, write_overrides


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "sub/overrides.jsonl"
    write_overrides(file, {"b": "noisy", "a": "normal"}, "wrong <reference>")
    assert read_overrides(file) == {"a": "normal", "b": "noisy"}
    write_overrides(file, {"b": "high_variance", "c": "normal"})
    assert read_overrides(file) == {"a": "normal", "b": "high_variance", "c": "normal"}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["uid"] for line in lines] == ["a", "b", "c"] and "note" not in lines[1]
    assert lines[0]["note"] == "wrong <reference>"
    write_overrides(file, {"d": "normal"}, "two\u2028lines\nand more\x85")
    assert read_overrides(file)["d"] == "normal" and len(read_overrides(file)) == 4


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("not json\n", "line 1: no override"),
        ('{"uid": "a", "bucket": "normal"}\n[1]\n', "line 2: no override"),
        ('{"uid": 3, "bucket": "normal"}', "line 1: no override"),
        ('{"uid": "a", "bucket": "normal", "keep": false}', "line 1: no override"),
        ('{"uid": "a", "bucket": "good"}', "line 1: bucket 'good'"),
        ('{"uid": "a"}', "line 1: bucket None"),
        ('{"uid": "a", "bucket": "normal"}\n\n{"uid": "a", "bucket": "noisy"}', "line 3: uid a has another bucket"),
    ],
)
def test_what_is_no_override(tmp_path, text, match):
    file = tmp_path / "o.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=match):
        read_overrides(file)
    with pytest.raises(InputError, match=match):
        write_overrides(file, {"z": "normal"})
    assert file.read_text() == text


def test_no_file_and_no_bucket(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_overrides(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="bucket 'bad'"):
        write_overrides(tmp_path / "o.jsonl", {"a": "bad"})
    assert not (tmp_path / "o.jsonl").exists()
