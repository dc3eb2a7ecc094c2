"""Train on exactly what `curate` measured: methods and metrics of continual post-training."""

__version__ = "0.1.0"
