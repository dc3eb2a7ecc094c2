"""The manifest: the contract between `curate` and `train`. Light on purpose: numpy and polars are all it needs."""

from curate.manifest.buckets import Bucket, Stats, classify
from curate.manifest.check import check
from curate.manifest.io import Manifest, read, write
from curate.manifest.schema import SCHEMA_VERSION, TABLES, ManifestError

__all__ = [
    "SCHEMA_VERSION",
    "TABLES",
    "Bucket",
    "Manifest",
    "ManifestError",
    "Stats",
    "check",
    "classify",
    "read",
    "write",
]
