"""The lock of a place in object storage: `.lock`, an object that one build creates and no other one can.

S3 and Google's storage create an object only where there is none (a precondition of the request). Other storage is
asked first, then written, and asked again after a pause: who is in the lock then, has it. The owner renews it every two
minutes. A lock that was not renewed for ten minutes has expired and is taken over, and so is one whose process, on this
machine, has ended. An owner that was only asleep finds out before its next upload, and stops. Clocks of machines that
publish to one place must agree within minutes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from curate.errors import InputError
from curate.manifest.remote import Remote, StorageError
from curate.manifest.schema import content_hash

LOCK = ".lock"
RENEWED = 120.0  # seconds between two signs of life
EXPIRES = 600.0  # seconds after the last one
PAUSE = 2.0  # seconds, where creation is not exclusive
EXCLUSIVE = {"s3", "s3a", "gs", "gcs", "memory"}


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as its object says it.

    Attributes:
        token: of this claim alone.
        machine: hash of the machine's name and its boot; a process number means something there only.
        pid: process.
        started: when the process began, in seconds since 1970.
        owner: for people.
        since: when the claim began, in seconds since 1970.
        seen: last sign of life, likewise.
    """

    token: str
    machine: str
    pid: int
    started: float
    owner: str
    since: float
    seen: float

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        now, pid = time.time(), os.getpid()
        return cls(uuid.uuid4().hex, _machine(), pid, psutil.Process().create_time(),
                   f"process {pid} on {platform.node()}", now, now)  # fmt: skip

    @classmethod
    def of(cls, body: bytes) -> Owner | None:
        """What a lock says; None where it is none of ours."""
        try:
            found = cls(**json.loads(body))
            times = (found.since, found.seen, found.started)
            sound = all(isinstance(t, int | float) and 0 <= t <= time.time() + EXPIRES for t in times)
            sound = sound and type(found.pid) is int and 0 <= found.pid < 1 << 31
            return found if sound and isinstance(found.token, str) and isinstance(found.owner, str) else None
        except (TypeError, ValueError, RecursionError):
            return None

    def body(self) -> bytes:
        """The object, renewed."""
        return (json.dumps({**vars(self), "seen": time.time()}, indent=2) + "\n").encode()

    @property
    def ended(self) -> bool:
        """True where the process was on this machine and is no more."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


def _machine() -> str:
    """This boot of this machine, or of this container: their names and process numbers repeat."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return content_hash([platform.node(), boot.read_text() if boot.exists() else psutil.boot_time(),
                         os.readlink(space) if space.exists() else ""])  # fmt: skip


@contextmanager
def claimed(remote: Remote, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the lock of a place; yields a function that raises where it is held no more.

    Raises:
        InputError: another build holds it. StorageError: the storage cannot be written.
    """
    me = Owner.me()
    _take(remote, me, note)
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(remote, me, done), daemon=True)
    thread.start()
    try:
        yield lambda: _check(remote, me)
    finally:
        done.set()
        thread.join()
        with suppress(StorageError):  # it expires by itself, and what was raised inside says more
            if _holds(remote, me):
                remote.delete(LOCK)


def _take(remote: Remote, me: Owner, note: Callable[[str], None]) -> None:
    while not _created(remote, me):
        if (body := remote.read(LOCK)) is None:
            continue  # given back just now
        if _token(body) == me.token:
            break  # created, but the answer was lost, and the file system tried again
        if refused := _refusal(remote, body):
            raise refused
        _write(remote, me)
        time.sleep(PAUSE)  # another build that has found it expired as well may have written after this one
        found = Owner.of(body)
        note(f"took over the lock {remote.url}/{LOCK} of {found.owner if found else 'nobody'}, which has ended")
        break
    _check(remote, me)


def _created(remote: Remote, me: Owner) -> bool:
    """False where a lock is there (asked first: not all that speak S3 know its preconditions)."""
    if remote.read(LOCK) is not None:
        return False
    if remote.url.partition("://")[0] in EXCLUSIVE:
        try:
            with remote.asked():
                remote.fs.pipe_file(remote.at(LOCK), me.body(), mode="create")
        except FileExistsError:
            return False
    else:
        _write(remote, me)
        time.sleep(PAUSE)
    return True


def _refusal(remote: Remote, body: bytes) -> InputError | None:
    """Why a lock cannot be taken over; None where it can."""
    lock, found = f"{remote.url}/{LOCK}", Owner.of(body)
    if found is None:
        return InputError(f"out {remote.url}: {lock} is there, and no lock of a build",
                          remedy="delete that object, or choose another place with out=URL")  # fmt: skip
    age = time.time() - found.seen
    if found.ended or age > EXPIRES:
        return None
    since = datetime.fromtimestamp(found.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return InputError(
        f"out {remote.url}: another build is at work there: {found.owner}, since {since}, last sign of life "
        f"{max(0, age):.0f} s ago ({lock})",
        remedy=f"wait for it, or choose another place with out=URL; if it has died, its lock expires in "
        f"{math.ceil((EXPIRES - age) / 60)} min, or at once when that object is deleted",
    )


def _write(remote: Remote, me: Owner) -> None:
    with remote.asked():
        remote.fs.pipe_file(remote.at(LOCK), me.body())


def _holds(remote: Remote, me: Owner) -> bool:
    return _token(remote.read(LOCK)) == me.token


def _token(body: bytes | None) -> str | None:
    found = Owner.of(body or b"")
    return None if found is None else found.token


def _check(remote: Remote, me: Owner) -> None:
    if not _holds(remote, me):
        raise InputError(f"out {remote.url}: another build has taken this place over ({remote.url}/{LOCK})",
                         remedy="wait for it and build again: what is done is kept")  # fmt: skip


def _renew(remote: Remote, me: Owner, done: threading.Event) -> None:
    while not done.wait(RENEWED):
        with suppress(StorageError):  # a fault of a moment; before an upload the lock is looked at
            if _holds(remote, me):
                _write(remote, me)
