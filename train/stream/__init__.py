"""`train stream`: a continual run from beginning to end, curate → train → evaluate, stage after stage, over a grid.

    config.py    what a stream is: tasks, orders, selectors, methods, seeds, arms and a grid over any of them
    plan.py      the grid as a tree of stages: what several runs have in common is done once
    stage.py     one stage: the files of `curate build`, `train METHOD`, `train fisher` and `train eval`, carried out
    pool.py      the stages of a plan in several processes, as many as memory allows
    results.py   the table: a row a run and stage, with R and its metrics
    page.py      the page: who forgets what, by how much runs differ, what they cost
    screen.py    what a person sees meanwhile; the commands by hand
    run.py       all of it

A stage is a folder with the configs of the four commands and their results beside them, and its inputs are the folders
of the stage before; so it can be run by hand, elsewhere, and the stream finds it done. This is the one room of `train`
that calls `curate.build` and borrows the parts of its page.
"""

from train.stream.config import StreamConfig
from train.stream.run import stream

__all__ = ["StreamConfig", "stream"]
