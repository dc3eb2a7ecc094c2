"""Rules of `check` for what the policy said: tokens, buckets, ranks and sides, augmentations. One function a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

import polars as pl

from curate.manifest.buckets import Bucket, Rule
from curate.manifest.io import Manifest
from curate.manifest.schema import sample_uid
from curate.manifest.tables import counts, value


def tokens(m: Manifest) -> Iterator[str]:
    """Token ids, log-probabilities and their number belong together; a log-probability is not above 0."""
    n, ids, logps = pl.col("n_tokens"), pl.col("token_ids"), pl.col("token_logps")
    no_logp = logps.list.eval(pl.element().is_finite().not_() | (pl.element() > 1e-4)).list.any()
    lengths = [column.is_not_null() & column.list.len().ne_missing(n) for column in (ids, logps)]
    nobody = [logps.is_not_null() & pl.col("policy").is_null(), ids.is_not_null() & pl.col("tokenizer").is_null()]
    wrong = m.scan("completions").filter(pl.any_horizontal(*lengths, no_logp.fill_null(False), *nobody))
    columns = ("uid", "token_ids", "token_logps", "n_tokens", "policy", "tokenizer")
    for uid, ids, logps, n, policy, tokenizer in wrong.select(columns).collect().iter_rows():
        where = f"completions.parquet: uid {uid}"
        for name, values in (("token_ids", ids), ("token_logps", logps)):
            if values is not None and len(values) != n:
                yield f"{where}: {len(values)} {name}, n_tokens is {n}"
        if logps is not None and not all(math.isfinite(p) and p <= 1e-4 for p in logps):
            yield f"{where}: column 'token_logps' holds a value that is no log-probability"
        if logps is not None and policy is None:
            yield f"{where}: log-probabilities, but column 'policy' does not say whose"
        if ids is not None and tokenizer is None:
            yield f"{where}: tokens, but column 'tokenizer' does not say whose"


def buckets(m: Manifest) -> Iterator[str]:
    """Every bucket is what the provenance's rule and statistics give, and the statistics are those of the rollouts."""
    rolled, facts = m.scan("completions").filter(origin="policy"), m.provenance.get("buckets")
    others = m.scan("completions").filter((pl.col("origin") != "policy") & pl.col("bucket").is_not_null())
    for uid in others.select("uid").collect()["uid"]:
        yield f"completions.parquet: uid {uid}: a bucket, but the policy did not write it"
    if facts is None:
        if value(rolled, pl.col("bucket").count()):
            yield "completions.parquet: buckets, but provenance.json has no rule for them"
        return
    config = {k: v for k, v in m.provenance["config"]["buckets"].items() if k in facts["rule"]}
    if "part" not in m.provenance and facts["rule"] != config:
        yield f"provenance.json: the rule of the buckets is {facts['rule']}, but the configuration says another"
    rule = Rule(**facts["rule"])
    expected, stats = rule.assign(rolled)
    by_hand = facts.get("overrides", {})
    said = rolled.select("uid", "bucket").collect().with_columns(right=expected)
    for uid in by_hand.keys() - set(said.filter(pl.col("uid").is_in(list(by_hand)))["uid"]):
        yield f"provenance.json: the bucket of {uid} was given by hand, but it is no rollout"
    given = pl.DataFrame(list(by_hand.items()), schema={"uid": pl.String, "given": pl.String}, orient="row")
    said = said.join(given, on="uid", how="left", maintain_order="left")
    said = said.select("uid", "bucket", right=pl.coalesce("given", "right"))
    for uid, bucket, right in said.filter(pl.col("bucket").ne_missing(pl.col("right"))).iter_rows():
        yield f"completions.parquet: uid {uid}: bucket {bucket!r}, rule and rollouts give {right!r}"
    if (known := {name: asdict(s) for name, s in stats.items()}) != facts["statistics"]:
        wrong = sorted(n for n in {*known, *facts["statistics"]} if known.get(n) != facts["statistics"].get(n))
        yield f"provenance.json: statistics of {wrong[0]!r} are not those of the rollouts: {known.get(wrong[0])}"
    found = counts(rolled, "task", "bucket")
    for row in m.tasks.filter(pl.col("rollouts").is_not_null()).iter_rows(named=True):
        for name in map(str, Bucket):
            if row[name] != found.get((row["task"], name), 0):
                yield f"tasks.parquet: task {row['task']!r}: {name} {row[name]}, completions.parquet gives " + str(
                    found.get((row["task"], name), 0)
                )
    totals = counts(rolled, "task")
    for task, rollouts in m.tasks.select("task", "rollouts").iter_rows():
        if (rollouts or 0) != (n := totals.get((task,), 0)):
            yield f"tasks.parquet: task {task!r}: rollouts {rollouts}, completions.parquet has {n}"


def answers(m: Manifest) -> Iterator[str]:
    """Ranks follow rewards; an answer that took the place of the source's is a rollout, and the source's is kept."""
    rolled, config = m.scan("completions").filter(origin="policy"), m.provenance["config"].get("candidates") or {}
    right = pl.col("reward").rank("min", descending=True).over("prompt_uid").cast(pl.Int32)
    right = right if config.get("rank") else pl.lit(None, dtype=pl.Int32)
    wrong = rolled.select("uid", "rank", right=right).filter(pl.col("rank").ne_missing(pl.col("right")))
    for uid, rank, expected in wrong.collect().iter_rows():
        yield f"completions.parquet: uid {uid}: rank {rank}, its reward gives {expected}"
    least = (m.provenance["config"].get("replay") or {}).get("min_reward")
    ranked = m.scan("completions").filter(pl.col("origin").is_in(["human", "annotated"]), pl.col("rank").is_not_null())
    place = pl.col("rank").rank("min").over("prompt_uid").cast(pl.Int32)
    wrong = ranked.select("uid", "rank", place=place).filter(pl.col("rank") != pl.col("place"))
    for uid, rank, expected in wrong.collect().iter_rows():
        yield f"completions.parquet: uid {uid}: rank {rank}, {expected - 1} answers of its prompt are better"
    by_policy = m.scan("samples").filter(pl.col("origin") != "augmented", written_by="policy")
    replaced = by_policy.select("uid", "completion", "references").collect()
    uids = replaced.lazy().select("uid")
    theirs = m.scan("completions").join(uids, left_on="prompt_uid", right_on="uid", how="semi").collect()
    known = {(o, p, t) for o, p, t in theirs.select("origin", "prompt_uid", "text").iter_rows()}
    for uid, completion, references in replaced.iter_rows():
        text = completion[0]["content"]
        if ("policy", uid, text) not in known:
            yield f"samples.parquet: uid {uid}: its answer is the policy's, but is no rollout in completions.parquet"
            continue
        good = theirs.filter(pl.col("finished").fill_null(True), origin="policy", prompt_uid=uid)
        best, mine = good["reward"].max(), good.filter(text=text)["reward"].max()
        if mine is None or mine != best or (least is not None and mine < least):
            yield f"samples.parquet: uid {uid}: its answer has reward {mine!r}, the best {best!r}, the least {least}"
        if ("gold", uid, references[0]) not in known:
            yield f"completions.parquet: the source's answer to prompt_uid {uid}, which gave way, is not there"


def sides(m: Manifest) -> Iterator[str]:
    """Sides follow similarities and the threshold, which is the configuration's."""
    config = m.provenance["config"].get("candidates") or {}
    threshold = (m.provenance.get("similarity") or {}).get("threshold")
    if threshold != (config.get("threshold") if config.get("similarity") else None):
        yield f"provenance.json: threshold of similarity {threshold}, but the configuration says another"
        return
    near = pl.col("similarity") >= pl.lit(threshold, dtype=pl.Float64)
    right = pl.when(near).then(pl.lit("align")).when(near.not_()).then(pl.lit("conflict"))
    wrong = m.scan("completions").filter(pl.col("side").ne_missing(right))
    for uid, similarity, side in wrong.select("uid", "similarity", "side").collect().iter_rows():
        if (similarity is None) != (side is None):
            yield f"completions.parquet: uid {uid}: similarity {similarity}, side {side}"
        else:
            yield f"completions.parquet: uid {uid}: side {side!r} at similarity {similarity}, threshold {threshold}"


def augmentations(m: Manifest) -> Iterator[str]:
    """A rewrite is kept where its score is above θ, its score is the product of both factors, and kept ones are in."""
    facts = m.provenance.get("augment")
    if facts is None:
        if m.augmentations.height:
            yield "augmentations.parquet: rows, but provenance.json has no θ for them"
        for uid in m.scan("samples").filter(origin="augmented").select("uid").collect()["uid"]:
            yield f"samples.parquet: uid {uid}: augmented, but provenance.json knows of no augmentation"
        return
    if facts["theta"] != m.provenance["config"]["augment"]["theta"]:
        yield f"provenance.json: θ {facts['theta']}, but the configuration says another"
    augmented = m.scan("samples").filter(origin="augmented").collect()
    samples = {row["uid"]: row for row in augmented.iter_rows(named=True)}
    kept = set(m.augmentations.filter("kept")["uid"])
    for row in m.augmentations.iter_rows(named=True):
        where, a, b = f"augmentations.parquet: uid {row['uid']}", row["mi_input"], row["mi_output"]
        scored = None if a is None or b is None else (a * b if a > 0 and b > 0 else 0.0)
        if row["fault"] is None and scored is None:
            yield f"{where}: neither a score nor a fault"
        if row["score"] != scored:
            yield f"{where}: score {row['score']}, its factors give {scored}"
        if row["kept"] != (row["fault"] is None and row["score"] is not None and row["score"] > facts["theta"]):
            yield f"{where}: kept {row['kept']} at score {row['score']}, θ {facts['theta']}, fault {row['fault']!r}"
        mine = [{"role": x["role"], "content": x["content"]} for x in row["prompt"]]
        answer = row["completion"][0]["content"]
        if sample_uid(row["task"], mine, row["completion"], [answer], parent_uid=row["parent_uid"]) != row["uid"]:
            yield f"{where}: uid is not the hash of its content; the row was edited"
        if row["template"] not in facts["templates"]:
            yield f"{where}: template {row['template']!r}, which the provenance does not have"
        if row["kept"] and row["uid"] in samples:
            sample = samples[row["uid"]]
            for column in ("mi_input", "mi_output", "parent_uid", "augmentation"):
                if sample[column] != row["template" if column == "augmentation" else column]:
                    yield f"samples.parquet: uid {row['uid']}: column {column!r} is not that of augmentations.parquet"
    for uid in sorted(kept ^ samples.keys()):
        yield f"augmentations.parquet: uid {uid}: kept there, or in samples.parquet as augmented, but not both"
    out = set(m.augmentations["uid"]) - kept
    for uid in sorted(out ^ set(m.scan("drops").filter(step="augment").select("uid").collect()["uid"])):
        yield f"drops.parquet: uid {uid}: a rewrite that is not kept belongs there, and none that is"
    counts = dict(m.augmentations.group_by("task").agg(pl.col("kept").sum()).iter_rows())
    for task, augmented in m.tasks.select("task", "augmented").iter_rows():
        if (augmented or 0) != counts.get(task, 0):
            yield f"tasks.parquet: task {task!r}: augmented {augmented}, augmentations.parquet keeps {counts.get(task)}"


def agreement(m: Manifest) -> Iterator[str]:
    """A completion is of its prompt's task, and says what the provenance says; measures lie within their ranges."""
    where = m.scan("samples").select(prompt_uid="uid", of_task="task", of_stage="stage")
    other = (pl.col("task") != pl.col("of_task")) | (pl.col("stage") != pl.col("of_stage"))
    answers = m.scan("completions").select("uid", "prompt_uid", "task", "stage")
    wrong = answers.join(where, on="prompt_uid", maintain_order="left").filter(other).drop("prompt_uid")
    for uid, task, stage, *of_prompt in wrong.collect().iter_rows():
        yield f"completions.parquet: uid {uid}: task {task!r}, stage {stage}, its prompt's are {tuple(of_prompt)}"
    rewrites = m.augmentations.lazy().select("uid", "parent_uid", "task", "stage")
    theirs = where.rename({"prompt_uid": "parent_uid", "of_task": "task", "of_stage": "stage"})
    wrong = rewrites.join(theirs, on=["parent_uid", "task", "stage"], how="anti", maintain_order="left")
    for uid, parent, task, stage in wrong.collect().iter_rows():
        yield f"augmentations.parquet: uid {uid}: parent_uid {parent} is no sample of task {task!r}, stage {stage}"
    policy = (m.provenance.get("models") or {}).get("policy") or {}
    every, facts = m.scan("completions"), m.provenance.get("rollouts") or {}
    rolled = every.filter(origin="policy")
    said = {"policy": (every, policy.get("fingerprint")), "tokenizer": (every, policy.get("tokenizer")),
            "reward_id": (rolled, facts.get("reward")), "temperature": (rolled, facts.get("temperature")),
            "top_p": (rolled, facts.get("top_p"))}  # fmt: skip
    for column, (rows, right) in said.items():
        if right is not None:
            for uid, found in rows.filter(pl.col(column) != right).select("uid", column).collect().iter_rows():
                yield f"completions.parquet: uid {uid}: {column} {found!r}, provenance.json says {right!r}"
    ranges = (("completions", "similarity"), ("augmentations", "mi_input"), ("augmentations", "mi_output"))
    for name, column in ranges:
        for uid, far in (
            m.scan(name).filter(pl.col(column).abs() > 1 + 1e-9).select("uid", column).collect().iter_rows()
        ):
            yield f"{name}.parquet: uid {uid}: {column} {far}, it must be within -1 and 1"


POLICY_RULES: tuple[Callable[[Manifest], Iterator[str]], ...] = (
    tokens,
    buckets,
    answers,
    sides,
    augmentations,
    agreement,
)
