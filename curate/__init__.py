"""Measure what a fine-tuning stream is about to forget, and build the replay data that prevents it."""

__version__ = "0.1.0"
