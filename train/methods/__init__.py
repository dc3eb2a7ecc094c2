"""Training methods: configuration, the calls of the model, the loss, and the method's own state."""

from train.methods.base import Method
from train.methods.cft import Cft
from train.methods.cpt import Cpt

__all__ = ["Cft", "Cpt", "Method"]
