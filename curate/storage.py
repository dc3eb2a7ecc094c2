"""Object storage as a build sees it: sources are fetched once, and a manifest is published by one build at a time.

A URL of a source stands for a local copy, which is fetched anew when the object has changed; everything that reads
sources reads that. `out: s3://…` is built in a working folder and published from there in the order in which
`curate.manifest.io.write` renames: the old `provenance.json` goes, the tables and the card are replaced, the new
`provenance.json` comes last. So at any moment there is the old manifest, none, or the new one. A reader who meets
objects of two manifests finds that their hashes are not those of the provenance that it has.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from curate.claim import claimed
from curate.errors import InputError
from curate.manifest.io import CARD, PROVENANCE, REPORT
from curate.manifest.remote import STAMPS, Remote, StorageError, cache_dir, is_url, outputs_of
from curate.manifest.schema import TABLES, content_hash


@contextmanager
def as_input_error(prefix: str = "") -> Iterator[None]:
    """A place in object storage that cannot be used is something that the user gave."""
    try:
        yield
    except StorageError as error:
        raise InputError(prefix + error.message, remedy=error.remedy) from None


def located(base: Path, path: str) -> Path:
    """A path of a config as a path of this process: relative to `base`, or the local copy of what a URL names.

    Raises:
        InputError: the URL cannot be fetched.
    """
    return fetch(path) if is_url(path) else base / path


def fetch(url: str) -> Path:
    """The local copy of an object, or of a folder of objects; fetched where this version of it is not there yet.

    Versions are told apart by size and what the storage says beside: hash, generation, time.

    Raises:
        InputError: nothing is there, it cannot be fetched, or it changes meanwhile.
    """
    with as_input_error():
        remote = Remote.of(url)
        versions = _versions(remote)
        folder = cache_dir() / "objects" / remote.slug / content_hash(versions)[:32]
        copy = folder / remote.root.rstrip("/").rpartition("/")[2]
        if not _whole(copy, versions):
            shutil.rmtree(folder, ignore_errors=True)  # of a copy that was damaged, or of which a part was deleted
            half = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            for private in (cache_dir(), cache_dir() / "objects", folder.parent, half):
                private.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                _download(remote, versions, half / copy.name)
                if _versions(remote) != versions:
                    raise InputError(f"{url}: changed while it was fetched", remedy="build again")
                _rename(half, folder)
            finally:
                shutil.rmtree(half, ignore_errors=True)
        return copy


def _versions(remote: Remote) -> dict[str, list[str]]:
    """Name below a place -> what identifies the object's content; the name is empty where the place is an object."""
    with remote.asked():
        remote.fs.invalidate_cache()  # hf:// keeps listings whatever it is told
        whole = remote.fs.info(remote.root)
        every = {remote.root: whole} if whole["type"] == "file" else remote.fs.find(remote.root, detail=True)
    found = {}
    for path, info in every.items():
        name = path.removeprefix(remote.root.rstrip("/")).removeprefix("/")
        if not name and whole["type"] != "file":
            continue  # an empty object that stands for the folder
        stamps = [f"{key}={info[key]}" for key in STAMPS if info.get(key) is not None]
        if (name and {"", ".", ".."} & {*name.split("/")}) or "\\" in name:
            raise InputError(f"{remote.url}: an object is named {name!r}", remedy="rename it: it is no path of a file")
        if not stamps:
            raise InputError(f"{remote.url}: the storage does not say when an object changes",
                             remedy="download it, and give the file's path")  # fmt: skip
        found[name] = [str(info["size"]), *stamps]
    if both := next((n for n in found for up in PurePosixPath(n).parents if str(up) in found), None):
        raise InputError(f"{remote.url}: {both!r} lies in an object, not in a folder", remedy="rename one of them")
    if not found:
        raise InputError(f"{remote.url}: the folder has no files", remedy="give a file, or a folder with data files")
    return found


def _whole(copy: Path, versions: Mapping[str, list[str]]) -> bool:
    """True where the copy has the files of these versions, of these sizes, and no other ones."""
    files = [copy] if "" in versions else [path for path in copy.rglob("*") if path.is_file()]
    found = {"" if path == copy else path.relative_to(copy).as_posix(): path for path in files if path.is_file()}
    return {name: str(path.stat().st_size) for name, path in found.items()} == {n: v[0] for n, v in versions.items()}


def _download(remote: Remote, versions: Mapping[str, list[str]], copy: Path) -> None:
    files = {name: copy / name if name else copy for name in versions}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with remote.asked():
        remote.fs.get([remote.at(name) if name else remote.root for name in files], [str(p) for p in files.values()])
    for name, path in files.items():
        if not path.is_file() or str(path.stat().st_size) != versions[name][0]:
            raise InputError(f"{remote.url}: {name or 'the object'} came incomplete", remedy="build again")


def _rename(half: Path, folder: Path) -> None:
    try:
        os.rename(half, folder)
    except OSError:
        if not folder.is_dir():  # another process has fetched the same version
            raise


class Place:
    """Where a manifest goes: a folder, or a URL with the working folder that is published to it.

    Attributes:
        folder: the manifest is written here.
        shown: what the user calls the place.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.remote: Remote | None = None
        self.folder, self.shown = Path(out), str(out)
        if isinstance(out, str) and is_url(out):
            with as_input_error("out "):
                self.remote = Remote.of(out)
            self.folder, self.shown = cache_dir() / "runs" / self.remote.slug, self.remote.url
        self._still_mine: Callable[[], None] = lambda: None

    @contextmanager
    def claimed(self, sources: Mapping[str, str], note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Inside, no other build publishes to this URL, and it was possible to write there. A folder has its own lock.

        Args:
            sources: name of a task -> path as the config has it.
            note: is told where the lock of a build that has died was taken over.

        Raises:
            InputError: the storage cannot be written, another build is at work, or something else lies there.
        """
        if self.remote is None:
            yield
            return
        for task, path in sources.items():
            if is_url(path) and f"{self.shown}/".startswith(path.rstrip("/") + "/"):
                raise InputError(f"out {self.shown}: lies inside the source of task {task!r} ({path})",
                                 remedy="choose another place with out=URL")  # fmt: skip
        with as_input_error("out "), claimed(self.remote, note) as self._still_mine:
            self._refuse_foreign(self.remote)
            yield

    def _refuse_foreign(self, remote: Remote) -> None:
        ours = {".lock", PROVENANCE, CARD, REPORT, *(table.file for table in TABLES.values())}
        there = remote.sizes().keys()
        if PROVENANCE not in there and (foreign := sorted(there - ours)):
            raise InputError(f"out {self.shown}: something else than a manifest lies there ({foreign[0]!r})",
                             remedy="choose a new place with out=URL")  # fmt: skip

    def publish(self) -> int:
        """Publish the manifest of the working folder and its page; returns how many files had to be uploaded.

        Raises:
            InputError: an upload failed, or the place is another build's by now; the same build goes on from here.
        """
        if self.remote is None:
            return 0
        with as_input_error("out "):
            moved = self._manifest(self.remote)
            page = self.folder / REPORT
            if page.is_file() and self.remote.sizes().get(REPORT) != page.stat().st_size:
                self._still_mine()
                self.remote.put(page, REPORT)
                moved += 1
        return moved

    def _manifest(self, remote: Remote) -> int:
        mine = (self.folder / PROVENANCE).read_bytes()
        names, there = sorted(outputs_of(mine)), remote.sizes()
        whole = all(there.get(name) == (self.folder / name).stat().st_size for name in names)
        put, lies = self._put_last(), remote.stamps()
        changed = put is not None and any(put.get(name) != lies.get(name) for name in names)
        if whole and not changed and _same(mine, remote.read(PROVENANCE)):
            return 0
        self._still_mine()
        for old in (PROVENANCE, REPORT):
            remote.delete(old)
        for name in [*names, PROVENANCE]:
            self._still_mine()
            remote.put(self.folder / name, name)
        self._record.write_text(json.dumps(remote.stamps()), encoding="utf-8")
        return len(names) + 1

    @property
    def _record(self) -> Path:
        """What the storage said of the objects when they had been put: another content has another stamp."""
        return self.folder.with_name(f".{self.folder.name}.published.json")

    def _put_last(self) -> dict[str, str] | None:
        try:
            return dict(json.loads(self._record.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def _same(mine: bytes, theirs: bytes | None) -> bool:
    """True for two provenances of one manifest; another version of a package may have written the other one."""
    return theirs is not None and bool(outputs_of(mine)) and _identity(mine) == _identity(theirs)


def _identity(body: bytes) -> Any:
    outputs = outputs_of(body)
    return outputs and (json.loads(body).get("build_key"), outputs)
