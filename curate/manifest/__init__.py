"""The manifest: the contract between `curate` and `train`. Light on purpose: numpy and polars are all it needs."""

from curate.manifest.buckets import Bucket, Rule, Stats, classify, moved_inside, sequence_logp
from curate.manifest.card import part_card
from curate.manifest.check import check
from curate.manifest.io import Manifest, read, write
from curate.manifest.part import part
from curate.manifest.schema import SCHEMA_VERSION, TABLES, ManifestError

__all__ = [
    "SCHEMA_VERSION",
    "TABLES",
    "Bucket",
    "Manifest",
    "ManifestError",
    "Rule",
    "Stats",
    "check",
    "classify",
    "moved_inside",
    "part",
    "part_card",
    "read",
    "sequence_logp",
    "write",
]
