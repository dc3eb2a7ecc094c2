"""Models that measure: the only place of `curate` that touches torch or a server."""

from curate.models.embedder import Embedder, open_embedder

__all__ = ["Embedder", "open_embedder"]
