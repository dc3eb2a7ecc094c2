"""Objectives as pure functions of tensors: no model, no config, no I/O."""
