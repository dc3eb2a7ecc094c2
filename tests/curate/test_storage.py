"""Publication, its lock and copies of sources, on fsspec's own storage in memory: the part that no service decides."""

import io
import json
import sys
import threading
import time
from dataclasses import replace

import fsspec
import polars as pl
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from curate import claim
from curate.build import build
from curate.claim import LOCK, Owner, claimed
from curate.config import BuildConfig
from curate.errors import InputError
from curate.folder import refuse_foreign
from curate.manifest import ManifestError, check, read
from curate.manifest.io import REPORT
from curate.manifest.remote import Remote, is_url, refuse_secrets
from curate.overrides import read_overrides
from curate.storage import Place, fetch

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def storage(tmp_path, monkeypatch):
    """Empty storage, and a cache of its own."""
    monkeypatch.setenv("REHEARSE_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr(claim, "PAUSE", 0.3)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


@pytest.fixture
def config(write_jsonl, tmp_path):
    """config(budget, out): a stream of two tasks, 20 rows each."""
    paths = [write_jsonl(f"{t}.jsonl", [{"instruction": f"{t} {i % 3}", "input": str(i), "output": f"{t}{i}"}
                                        for i in range(20)]) for t in "ab"]  # fmt: skip
    tasks = [{"name": path.stem, "path": str(path), "format": "alpaca"} for path in paths]

    def made(budget, out=URL):
        replay = {"selector": "uniform", "budget": budget}
        return {"tasks": tasks, "replay": replay, "out": str(out), "cache": str(tmp_path / "stages")}

    return made


def uids(manifest):
    return manifest.samples["uid"].to_list()


def test_an_upload_that_fails_at_any_step_leaves_the_old_manifest_or_none(config, tmp_path, monkeypatch):
    old, new = (build(config(n, tmp_path / f"run-{n}")) for n in (3, 4))
    place, steps, left = Place(URL), [], [0]

    def failing(method):
        def step(self, *arguments, **how):
            if left[0] == 0:
                raise ConnectionError("the network is down")
            left[0] -= 1
            steps.append(method.__name__)
            return method(self, *arguments, **how)

        return step

    for name in ("put_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, failing(getattr(MemoryFileSystem, name)))

    def published(manifest, after):
        left[0], place.folder = after, manifest.folder
        return place.publish()

    published(old, 99)
    steps.clear()
    published(new, 99)
    # provenance.json and report.html go; seven tables and the card, provenance.json, and the page come
    assert steps == ["rm_file"] * 2 + ["put_file"] * 10
    for n in range(len(steps)):
        published(old, 99)
        with pytest.raises(InputError, match="cannot be reached"):
            published(new, n)
        if n == 0:
            assert uids(read(URL)) == uids(old)
        elif n < 11:
            with pytest.raises(ManifestError, match=f"{URL}: no provenance.json"):
                read(URL)
        else:  # the manifest is whole, its page is not there yet
            assert uids(read(URL)) == uids(new)
        assert published(new, 99) > 0
        assert uids(read(URL)) == uids(new) and check(URL) == []
        assert published(new, 0) == 0  # nothing is sent of what lies there


def test_objects_of_two_manifests_are_refused_and_a_lost_one_is_sent_again(config, storage):
    build(config(3))
    place = Place(URL)
    whole = (place.folder / "samples.parquet").read_bytes()
    storage.pipe_file("/bucket/run/samples.parquet", whole[:-1] + b"?")
    with pytest.raises(ManifestError, match=f"{URL}/samples.parquet: changed since the build"):
        read(URL)
    assert any(fault.startswith(f"{URL}/samples.parquet: changed") for fault in check(URL))
    storage.rm_file("/bucket/run/samples.parquet")
    with pytest.raises(ManifestError, match=f"{URL}/samples.parquet: missing"):
        read(URL)
    build(config(3))
    assert storage.cat_file("/bucket/run/samples.parquet") == whole
    assert check(URL) == []


def test_a_copy_that_was_damaged_is_fetched_again(config):
    build(config(3))
    copy = read(URL).folder / "tasks.parquet"
    copy.write_bytes(b"PAR1")
    assert read(URL).tasks.height == 2


def test_an_object_that_is_damaged_where_it_lies_is_seen_and_mended(config, storage):
    build(config(3))
    assert not check(URL)  # this machine has a copy now
    whole = storage.cat("/bucket/run/samples.parquet")
    storage.pipe("/bucket/run/samples.parquet", whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])  # as long as before
    assert "samples.parquet" in check(URL)[0]
    build(config(3))  # what the message says
    assert storage.cat("/bucket/run/samples.parquet") == whole and not check(URL)
    storage.rm("/bucket/run/samples.parquet")
    assert "samples.parquet: missing" in check(URL)[0]


@pytest.mark.parametrize("name", ["..", "", "a\0b", "\ud800", "x" * 300, "../../x"])
def test_a_provenance_that_names_odd_files_is_refused(config, storage, name):
    build(config(3))
    provenance = json.loads(storage.cat("/bucket/run/provenance.json"))
    provenance["outputs"][name] = "0" * 64
    storage.pipe("/bucket/run/provenance.json", json.dumps(provenance).encode())
    with pytest.raises(ManifestError, match="is not a plain file name"):
        read(URL)


def test_nothing_of_others_is_touched(config, storage):
    storage.pipe_file("/bucket/run/thesis.tex", b"...")
    with pytest.raises(InputError, match=r"something else than a manifest lies there \('thesis.tex'\)"):
        build(config(3))
    assert list(storage.store) == ["/bucket/run/thesis.tex"]


def test_out_is_not_inside_a_source(config):
    inside = config(3)
    inside["tasks"][0] = {**inside["tasks"][0], "path": "memory://bucket"}
    with pytest.raises(InputError, match="lies inside the source of task 'a'"):
        build(inside)


# --- the lock ---


def lock_of(machine="another", **how):
    """A lock of a process that is 30 s old."""
    now = time.time()
    return replace(Owner.me(), machine=machine, owner="process 7 on elsewhere", since=now - 3600, seen=now - 30, **how)


def put(storage, owner):
    storage.pipe_file(f"/bucket/run/{LOCK}", json.dumps(vars(owner)).encode())


def test_a_second_build_is_refused_and_told_of_the_first(config, storage):
    with claimed(Remote.of(URL), print), pytest.raises(InputError, match=f"at work there.*{URL}/.lock"):
        build(config(3))
    assert not storage.store  # given back
    put(storage, lock_of())
    with pytest.raises(InputError, match=r"process 7 on elsewhere, since .* last sign of life 30 s ago") as refused:
        build(config(3))
    assert "its lock expires in 10 min" in str(refused.value)  # (600 - 30) / 60 = 9.5
    assert list(storage.store) == [f"/bucket/run/{LOCK}"]  # the other's, and nothing beside


@pytest.mark.parametrize("dead", [
    lambda: replace(lock_of(), seen=time.time() - claim.EXPIRES - 1),      # no sign of life for too long
    lambda: lock_of(Owner.me().machine, pid=2**22 + 1),                    # no such process on this machine
    lambda: replace(lock_of(Owner.me().machine), started=1.0),             # its number is another process's by now
])  # fmt: skip
def test_the_lock_of_a_build_that_has_died_is_taken_over(storage, dead):
    put(storage, dead())
    said = []
    with claimed(Remote.of(URL), said.append):
        assert "process 7 on elsewhere" in said[0]
    assert not storage.store


@pytest.mark.parametrize("body", [
    '{"token": 1}', "[" * 100_000, json.dumps(vars(lock_of()) | {"since": float("inf")}),
    json.dumps(vars(lock_of()) | {"since": 1e18}), json.dumps(vars(lock_of()) | {"pid": 1.5}),
    json.dumps(vars(lock_of()) | {"seen": time.time() + 31_536_000}),  # it would be held for a year
])  # fmt: skip
def test_what_is_no_lock_stays(storage, body):
    storage.pipe_file(f"/bucket/run/{LOCK}", body.encode())
    with pytest.raises(InputError, match="no lock of a build"), claimed(Remote.of(URL), print):
        pass
    assert storage.cat_file(f"/bucket/run/{LOCK}") == body.encode()


def test_who_has_lost_the_lock_sends_nothing(config, storage, tmp_path):
    place, manifest = Place(URL), build(config(3, tmp_path / "run"))
    place.folder = manifest.folder
    with place.claimed({}):
        put(storage, lock_of())
        with pytest.raises(InputError, match="taken this place over"):
            place.publish()
    assert list(storage.store) == [f"/bucket/run/{LOCK}"]


def test_the_lock_is_renewed(storage, monkeypatch):
    monkeypatch.setattr(claim, "RENEWED", 0.02)
    with claimed(Remote.of(URL), print) as check_lock:
        first = Owner.of(storage.cat_file(f"/bucket/run/{LOCK}"))
        time.sleep(0.2)
        again = Owner.of(storage.cat_file(f"/bucket/run/{LOCK}"))
        check_lock()
    assert first.token == again.token and again.seen > first.seen


def test_where_creation_is_not_exclusive_one_build_gets_the_lock(storage, monkeypatch):
    asked, end, won, lost = threading.Barrier(4), threading.Barrier(4), [], []
    whole = MemoryFileSystem.pipe_file

    def together(self, *arguments, **how):
        asked.wait()  # all have found no lock before one of them writes
        whole(self, *arguments, **how)

    def compete(number):
        try:
            with claimed(Remote.of(URL), print):
                won.append(number)
                end.wait()
        except InputError:
            lost.append(number)
            end.wait()

    monkeypatch.setattr(claim, "EXCLUSIVE", set())
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", together)
    threads = [threading.Thread(target=compete, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 3
    assert not storage.store


# --- sources ---


def test_a_source_is_fetched_once_and_anew_when_it_has_changed(storage):
    storage.pipe_file("/bucket/in/a.jsonl", b"one")
    first = fetch("memory://bucket/in/a.jsonl")
    assert (first.name, first.read_bytes()) == ("a.jsonl", b"one")
    assert fetch("memory://bucket/in/a.jsonl") == first
    storage.pipe_file("/bucket/in/a.jsonl", b"two")  # of the same size
    assert fetch("memory://bucket/in/a.jsonl").read_bytes() == b"two"
    assert first.read_bytes() == b"one"  # a build that began with it still has it


def test_a_folder_of_objects_is_a_folder(storage):
    for name in ("x.jsonl", "deep/y.jsonl"):
        storage.pipe_file(f"/bucket/in/{name}", name.encode())
    folder = fetch("memory://bucket/in")
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == {"x.jsonl": "x.jsonl", "deep/y.jsonl": "deep/y.jsonl"}
    with pytest.raises(InputError, match="memory://bucket/nothing: no such object"):
        fetch("memory://bucket/nothing")


def test_a_copy_of_a_source_that_lost_a_file_or_bytes_is_fetched_again(storage):
    wanted = {"x.jsonl": "one", "deep/y.jsonl": "two"}
    for name, text in wanted.items():
        storage.pipe_file(f"/bucket/in/{name}", text.encode())
    folder = fetch("memory://bucket/in")
    assert [p.stat().st_mode & 0o777 for p in (folder.parent, folder.parent.parent)] == [0o700, 0o700]
    for damage in (lambda: (folder / "x.jsonl").unlink(), lambda: (folder / "deep/y.jsonl").write_text("tw")):
        damage()
        assert fetch("memory://bucket/in") == folder
        assert {name: (folder / name).read_text() for name in wanted} == wanted


def test_an_object_that_changes_while_it_is_fetched_is_not_kept(storage, monkeypatch, tmp_path):
    storage.pipe_file("/bucket/a.jsonl", b"one")
    whole = MemoryFileSystem.get_file

    def slow(self, path, *arguments, **how):
        whole(self, path, *arguments, **how)
        self.pipe_file(path, b"two")

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    with pytest.raises(InputError, match="changed while it was fetched"):
        fetch("memory://bucket/a.jsonl")
    assert not [p for p in (tmp_path / "copies").rglob("*") if p.is_file()]


def test_vectors_and_corrections_may_be_urls(config, storage):
    texts = [f"{task} {n}" for task in "ab" for n in range(3)]
    vectors = io.BytesIO()
    pl.DataFrame({"text": texts, "embedding": [[1.0, 0.1 * n] for n in range(6)]}).write_parquet(vectors)
    storage.pipe_file("/bucket/v.parquet", vectors.getvalue())
    measured = {"embed": {"backend": "precomputed", "path": "memory://bucket/v.parquet"},
                "replay": {"selector": "dynamic_only", "budget": 3}, "out": "memory://bucket/measured"}  # fmt: skip
    assert build({**config(3), **measured}).tasks["distance"][0] > 0
    storage.pipe_file("/bucket/v.parquet", b"PAR1")
    with pytest.raises(InputError, match=r"embed.path memory://bucket/v.parquet: not readable as Parquet"):
        build({**config(3), **measured})
    storage.pipe_file("/bucket/o.jsonl", b'{"uid": "a", "bucket": "noisy"}')
    more = {"policy": "not-opened", "rollouts": {"k": 1}, "buckets": {"overrides": "memory://bucket/o.jsonl"}}
    parsed = BuildConfig.parse({**config(3), **more})
    place = parsed.resolve(parsed.buckets.overrides)
    assert read_overrides(place) == {"a": "noisy"}
    storage.pipe_file("/bucket/o.jsonl", b"x")
    with pytest.raises(InputError, match=r"memory://bucket/o.jsonl: line 1: no override"):
        read_overrides(place)


# --- URLs ---


@pytest.mark.parametrize("url", ["s3://AKIAKEY:hush@bucket/x", "s3://hush@bucket/x", "s3://AKIAKEY:a/hush@bucket/x",
                                 "https://bucket/x?Signature=hush"])  # fmt: skip
def test_a_url_with_a_secret_is_refused_and_not_shown(config, url):
    for broken in ({**config(3), "out": url}, {**config(3), "tasks": [{"name": "a", "path": url, "format": "alpaca"}]}):
        with pytest.raises(InputError, match="no user, password or query") as refused:
            build(broken)
        assert "hush" not in str(refused.value) and "AKIAKEY" not in str(refused.value)
    with pytest.raises(ManifestError, match="no user, password or query") as refused:
        read(url)
    assert "hush" not in str(refused.value)


def test_what_is_a_url(tmp_path):
    assert is_url("s3://bucket/x") and is_url("hf://datasets/a/b/c.jsonl")
    assert not is_url("runs/x") and not is_url("owner/name") and not is_url("C:/x") and not is_url(tmp_path)
    assert refuse_secrets("a@b?c") == "a@b?c"  # a path
    for odd in ("file:///etc", "s3://", "s3://b/../c", "zip://x::s3://b/c"):
        with pytest.raises(ManifestError):
            refuse_secrets(odd)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"pip install 'rehearse\[gcs\]'"):
        Place("gs://bucket/x")
    with pytest.raises(InputError, match="no storage that fsspec knows"):
        Place("s4://bucket/x")


def test_what_a_killed_build_left_is_no_stranger(tmp_path):
    (tmp_path / f".{REPORT}.4711").touch()  # killed while it wrote the page, and again before provenance.json
    refuse_foreign(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"other files than a manifest \('thesis.tex'\)"):
        refuse_foreign(tmp_path)
