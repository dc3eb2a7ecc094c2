"""Builds that several tests look at. One module's share a folder and its cache: each prompt is answered once."""

import os

import pytest
from policy_runs import (
    AUGMENT,
    FACTS,
    JUDGE,
    KEY,
    ROLLOUTS,
    STARTER,
    VARIABLE,
    judged_by,
    put,
    real,
    rewriter,
    server,
    settings,
    task,
)

from curate.build import build


@pytest.fixture(scope="module")
def key():
    """The key of the scripted servers, where a user keeps one: in the environment."""
    os.environ[VARIABLE] = KEY
    yield
    del os.environ[VARIABLE]


@pytest.fixture(scope="module")
def folder(key, tmp_path_factory):
    """Real rows as small tasks, and the starter model beside them."""
    folder = tmp_path_factory.mktemp("policy")
    put(folder / "poem.jsonl", real("superni/sentiment_analysis", 12, task="task833"))
    put(folder / "tense.jsonl", real("superni/text_quality_evaluation", 9, task="task429"))
    put(folder / "facts.jsonl", real("conflict/templama", 6))
    put(folder / "older.jsonl", real("conflict/templama", 14)[6:])
    ranked = real("ranked/qa_feedback", 10)
    put(folder / "ranked.jsonl", ranked[5:])  # answers of three of them share a rank
    put(folder / "code.jsonl", real("superni/code", 4, task="task868"))
    pairs = []
    for row in ranked[:5]:
        answers = sorted(row["candidates"], key=lambda c: c["rank"])
        pairs.append({"prompt": row["question"], "chosen": answers[0]["text"], "rejected": answers[-1]["text"]})
    put(folder / "pairs.jsonl", pairs)
    (folder / "starter").symlink_to(STARTER)
    (folder / "judge.py").write_text(JUDGE)
    return folder


@pytest.fixture(scope="module")
def small(folder):
    """8 replayed and 6 current rows, 3 rollouts each, 12 rewrites: the build that nobody disturbed."""
    return build(settings(folder, "small", rollouts=ROLLOUTS, augment=AUGMENT))


@pytest.fixture(scope="module")
def compared(folder, small):
    """The same with the rollouts beside their targets."""
    similar = {"similarity": True, "threshold": 0.2}
    return build(settings(folder, "compared", rollouts=judged_by("length"), candidates=similar))


@pytest.fixture(scope="module")
def rewritten(folder):
    """A build whose rewrites have scores from 0 to nearly 1, since a server wrote them. The server is gone by then."""
    with server(rewriter) as (model, bodies):
        wanted = settings(
            folder, "rewritten", tasks=[task("tense"), task("facts", **FACTS)], policy=model,
            replay={"budget": 9}, rollouts={"k": 2, "per_task": 4}, augment={"theta": 0.1},
        )  # fmt: skip
        build(wanted)
        # 8 prompts twice, 9 rows by 3 templates, an answer to each rewrite but one that was cut and one empty
        assert len(bodies) == 16 + 27 + 25
    return wanted
