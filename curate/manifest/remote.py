"""Places that are no folders: URLs of object storage (s3://, gs://, hf://, …), through fsspec.

Owns what a URL may look like, which file system serves it, what that one's errors mean in words, and the local copy of
a manifest. A copy lies in `cache_dir()` and may be deleted at any time. Credentials are the storage's own affair: its
library takes them from the environment or its configuration, and no URL, message or file of ours holds one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from curate.manifest.schema import ManifestError, content_hash

PROVENANCE = "provenance.json"

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # scheme -> extra of this distribution
_ACCESS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or ~/.aws (another endpoint: AWS_ENDPOINT_URL)",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "hf": "HF_TOKEN, or `hf auth login`",
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOError", "ProfileNotFound", "GoogleAuthError", "LocalTokenNotFoundError",
}  # fmt: skip
_UNREACHABLE = {
    "ConnectionError", "HTTPClientError", "ClientConnectionError", "TransportError", "TimeoutError",
    "OfflineModeIsEnabled", "NoRegionError",
}  # fmt: skip


class StorageError(ManifestError):
    """A place in object storage that cannot be used."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}\n  remedy: {remedy}")
        self.message, self.remedy = message, remedy


def is_url(place: str | os.PathLike[str]) -> bool:
    """True for `scheme://…`; a `Path` is never one, for it folds the slashes."""
    return isinstance(place, str) and _URL.match(place) is not None


def refuse_secrets(place: str) -> str:
    """The place as it is, unless it is a URL that holds, or may hold, a secret, or is none that a build can name.

    Raises:
        StorageError: without the part that must not be shown.
    """
    if not is_url(place):
        return place
    scheme, _, rest = place.partition("://")
    host, slash, path = rest.partition("/")
    if scheme in (*EXTRAS, "hf") and (":" in host or "@" in host):  # a secret may have slashes: none of it is shown
        raise StorageError(f"{scheme}://…: a URL must hold no user, password or query",
                           f"leave it away; credentials: {_access(scheme)}")  # fmt: skip
    if "@" in host or "?" in rest:
        shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".partition("?")[0]
        raise StorageError(f"{shown}: a URL must hold no user, password or query",
                           f"leave it away; credentials: {_access(scheme)}")  # fmt: skip
    if "::" in place or scheme in ("file", "local"):
        raise StorageError(f"{place}: no URL of object storage", "give a path, or one URL like s3://bucket/folder")
    if not rest.strip("/") or ".." in rest.split("/"):
        raise StorageError(f"{place}: names no place", "give a bucket and a path: s3://bucket/folder")
    return place


def cache_dir() -> Path:
    """Where local copies of what lies in object storage are kept: REHEARSE_CACHE, or `rehearse` in the user's cache."""
    mine, users = os.environ.get("REHEARSE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(mine) if mine else (Path(users) if users else Path.home() / ".cache") / "rehearse"


def _access(scheme: str) -> str:
    return _ACCESS.get(EXTRAS.get(scheme, scheme), "see the documentation of fsspec's file system for this scheme")


@lru_cache(maxsize=4)
def _file_system(scheme: str, pid: int, environment: frozenset[tuple[str, str]]) -> Any:
    """The file system of fsspec, without listings that are kept; another environment may have other credentials."""
    import fsspec

    logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # its retries would be printed without any handler
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)


# what tells one content of an object from another, by the names that the file systems have for it
STAMPS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "blob_id", "content_md5", "LastModified",
          "last_modified", "updated", "mtime", "created")  # fmt: skip
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # names of files that are fetched


@dataclass(frozen=True)
class Remote:
    """A place in object storage.

    Attributes:
        url: as it was given, without a slash at the end.
        fs: fsspec's file system, which keeps no listings.
        root: the path that `fs` knows it by.
    """

    url: str
    fs: Any
    root: str

    @classmethod
    def of(cls, url: str) -> Remote:
        """The place that a URL names; nothing is asked of the storage yet.

        Raises:
            StorageError: a scheme that is not known or whose package is missing, or a URL with a secret in it.
        """
        refuse_secrets(url)
        scheme = url.partition("://")[0]
        try:
            fs = _file_system(scheme, os.getpid(), frozenset(os.environ.items()))
        except ImportError as error:
            package = EXTRAS.get(scheme)
            remedy = f"pip install 'rehearse[{package}]'" if package else f"install what it needs: {_plain(error)}"
            raise StorageError(f"{url}: the package for {scheme}:// is not installed", remedy) from None
        except ValueError:
            raise StorageError(
                f"{url}: {scheme}:// is no storage that fsspec knows", "use s3://, gs:// or hf://"
            ) from None
        except Exception as error:
            raise _in_words(error, url) from None
        return cls(url.rstrip("/"), fs, fs._strip_protocol(url.rstrip("/")))

    def at(self, name: str) -> str:
        """The path of an object below this place."""
        return f"{self.root.rstrip('/')}/{name}"

    @property
    def slug(self) -> str:
        """A name for local copies: readable, and another one for every URL."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.url)[:80].strip("._") + "-" + content_hash(self.url)[:12]

    @contextmanager
    def asked(self, what: str = "") -> Iterator[None]:
        """Inside, whatever the storage raises becomes a StorageError; FileExistsError and faults of this disk stay."""
        try:
            yield
        except (ManifestError, FileExistsError):
            raise
        except OSError as error:
            if error.filename is not None or error.errno in _LOCAL_FAULTS:
                raise
            raise _in_words(error, what or self.url) from None
        except Exception as error:
            _file_system.cache_clear()  # credentials may be given in a file by the next time
            raise _in_words(error, what or self.url) from None

    def read(self, name: str) -> bytes | None:
        """The bytes of a small object; None where there is none (its bucket must be there)."""
        with self.asked():
            try:
                return bytes(self.fs.cat_file(self.at(name)))
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return None

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of what lies directly in this place, folders too; {} where there is nothing."""
        return {name: int(info["size"] or 0) for name, info in self._listed().items()}

    def stamps(self) -> dict[str, str]:
        """Name -> what the storage says of an object's content: its size, hash, generation, time."""
        return {name: ", ".join([str(info["size"]), *(f"{k}={info[k]}" for k in STAMPS if info.get(k) is not None)])
                for name, info in self._listed().items()}  # fmt: skip

    def _listed(self) -> dict[str, Any]:
        with self.asked():
            self.fs.invalidate_cache()  # hf:// keeps listings whatever it is told
            try:
                found = self.fs.ls(self.root, detail=True)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return {}
            return {each["name"].rstrip("/").rpartition("/")[2]: each for each in found
                     if each["name"].rstrip("/") != self.root.rstrip("/")}  # fmt: skip

    def get(self, name: str, path: Path) -> None:
        """Fetch an object into a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with self.asked(f"{self.url}/{name}"):
                self.fs.get_file(self.at(name), str(half))
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> None:
        """Publish a file as an object, which object storage shows whole or not at all."""
        with self.asked(f"{self.url}/{name}"):
            self.fs.put_file(str(path), self.at(name))

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with self.asked(f"{self.url}/{name}"), suppress(FileNotFoundError):
            self.fs.rm_file(self.at(name))


@contextmanager
def local(place: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder of a manifest: itself, or the local copy of one in object storage, whose faults are told of the URL.

    Raises:
        StorageError: the storage cannot be used.
        ManifestError: what is raised inside, with the URL in place of the copy.
    """
    folder = fetched(place)
    try:
        yield folder
    except ManifestError as error:
        if not is_url(place):
            raise
        raise ManifestError(named(str(error), folder, place)) from None


def named(text: str, folder: Path, place: str | os.PathLike[str]) -> str:
    """A message about a local copy as one about the place that it is of."""
    return text.replace(str(folder), str(place).rstrip("/")) if is_url(place) else text


def fetched(place: str | os.PathLike[str]) -> Path:
    """The folder of a manifest: a path as it is; of a URL a local copy, of which only what is missing is fetched.

    The copy is named after the URL and the hash of its `provenance.json`, so a manifest that is replaced is another
    copy. It holds the files that the provenance lists. A file of other bytes than listed, or whose object is another
    one by what the storage says now, is fetched again. What it then is the reader finds out, who compares the hashes as
    in any folder.

    Raises:
        ManifestError: there is no finished manifest; StorageError: the storage cannot be used.
    """
    if not isinstance(place, str) or not is_url(place):
        return Path(place)
    remote = Remote.of(place)
    if (body := remote.read(PROVENANCE)) is None:
        raise ManifestError(f"{remote.url}: no {PROVENANCE}, so this is not a finished manifest; run `curate build` "
                            "again, or wait if a build is publishing there")  # fmt: skip
    folder = cache_dir() / "manifests" / remote.slug / hashlib.sha256(body).hexdigest()[:32]
    there, record = remote.stamps(), folder.with_name(f".{folder.name}.stamps.json")
    seen = _recorded(record)
    for name, digest in outputs_of(body).items():
        if PLAIN.fullmatch(name) and not (_has(folder / name, digest) and seen.get(name) == there.get(name)):
            (folder / name).unlink(missing_ok=True)
            if name in there:
                remote.get(name, folder / name)
    if seen != there:
        folder.mkdir(parents=True, exist_ok=True)
        half = record.with_name(f"{record.name}.{uuid.uuid4().hex[:8]}")
        half.write_text(json.dumps(there), encoding="utf-8")
        os.replace(half, record)
    if not (folder / PROVENANCE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f".{PROVENANCE}.{uuid.uuid4().hex[:8]}"
        half.write_bytes(body)  # what was read above; what lies there by now may be of the next manifest
        os.replace(half, folder / PROVENANCE)
    return folder


def _recorded(path: Path) -> dict[str, str]:
    """What the storage said of the objects when they were fetched."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def outputs_of(body: bytes) -> dict[str, str]:
    """File name -> sha256 as a provenance lists them; {} where it is none."""
    try:
        found = json.loads(body)["outputs"]
        return {name: digest for name, digest in found.items() if isinstance(digest, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _has(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _no_bucket(error: BaseException) -> bool:
    return "bucket" in str(error).lower() and "not exist" in str(error).lower()


def _plain(error: BaseException) -> str:
    """The first line of an error without what stands before an @ or behind a ? of a URL."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return re.sub(r"\?\S*", "", re.sub(r"//[^/\s@]*@", "//…@", text))


def _in_words(error: Exception, url: str) -> StorageError:
    """What an error of a file system means, by the names of its classes: the libraries have no base class in common."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    scheme, _, rest = url.partition("://")
    bucket = f"{scheme}://{'/'.join(rest.split('/')[: 3 if scheme == 'hf' else 1])}"  # hf://datasets/owner/name
    if kinds & _CREDENTIALS:
        return StorageError(f"{url}: no credentials for {bucket}", f"set {_access(scheme)}")
    if isinstance(error, PermissionError):
        return StorageError(
            f"{url}: {bucket} refuses access ({_plain(error)})", f"check the rights of {_access(scheme)}"
        )
    if isinstance(error, FileNotFoundError):
        if _no_bucket(error):
            return StorageError(f"{url}: there is no bucket {bucket}", "correct the URL, or make the bucket")
        return StorageError(f"{url}: no such object, or no such bucket", "correct the URL, or make the bucket")
    if kinds & _UNREACHABLE:
        return StorageError(
            f"{url}: {bucket} cannot be reached ({_plain(error)})", f"check the network; {_access(scheme)}"
        )
    return StorageError(f"{url}: {bucket} cannot be used ({type(error).__name__}: {_plain(error)})",
                        f"check the URL and {_access(scheme)}")  # fmt: skip
