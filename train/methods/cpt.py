"""CPT: continued pre-training. The loss is on all tokens of packed blocks; old domains come back by the mixture.

It is CFT without the terms that hold old tasks: which tokens are targets is decided in `train.data`.
"""

from __future__ import annotations

from train.methods.cft import Cft


class Cpt(Cft):
    """NLL over all tokens."""

    name: str = "cpt"
