"""The stages that ask the policy, between the draw and the manifest: rollouts, rewards, on-policy replay, candidates,
buckets, augmentation. Each takes tables and gives tables; what comes of them is one `PolicyWork`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from curate import augment, candidates
from curate.cached import Cached
from curate.config import BuildConfig, ModelConfig
from curate.embed import Embeddings
from curate.errors import InputError
from curate.ingest import TaskRows
from curate.manifest import Rule
from curate.manifest.schema import AUGMENTATIONS, COMPLETIONS, DROPS, sample_uid
from curate.models.base import Completion, Reward
from curate.overrides import read_overrides
from curate.rollout import best, in_batches, reward_blocks, rewards, rollouts, sampling_of, some_rows, that_fit
from curate.screen import Screen
from curate.store import Store


@dataclass(frozen=True)
class PolicyWork:
    """What the stages made of the rows of a build.

    `rows` are those that go into samples, by stage and final uid; `source_uid` is the one that they were read with.
    """

    rows: pl.LazyFrame
    completions: pl.DataFrame
    augmentations: pl.DataFrame
    drops: pl.DataFrame
    facts: dict[str, Any]


class PolicyStages:
    """Runs the stages over the rows of one build. Without a policy only the answers that the data brings are left.

    Args:
        config: the build's.
        policy: the model that is being trained, or None.
        reward: opens the reward; called where rollouts are made.
        embeddings: gives the build's vectors; called where similarities are measured.
        store: where results are kept.
        screen: where progress goes.
    """

    def __init__(
        self,
        config: BuildConfig,
        policy: Cached | None,
        reward: Callable[[], Reward],
        embeddings: Callable[[], Embeddings],
        store: Store,
        screen: Screen,
    ) -> None:
        self.config, self.policy, self.store, self.screen = config, policy, store, screen
        self._reward, self._embeddings = reward, embeddings
        self.facts: dict[str, Any] = {}

    def run(self, rows: pl.LazyFrame, tasks: Sequence[TaskRows]) -> PolicyWork:
        """All stages over `rows`: uid, task, stage, origin and the columns of `curate.ingest.ROWS`; by stage and uid.

        Only rows that the policy is asked about are loaded.
        """
        rows = rows.with_columns(source_uid=pl.col("uid"), written_by=pl.lit("gold"))
        if self.config.replay.completions == "gold":
            self.to_rewrite(rows)  # a prompt that is too long is found out before the first answer is waited for
        rolled, drops = self.roll(rows), DROPS.empty()
        gold = pl.DataFrame(schema={"source_uid": pl.String, "text": pl.String})
        if rolled is not None and self.config.replay.completions == "policy":
            replayed, gold, drops = on_policy(rows.filter(origin="replay").collect(), rolled, self.config)
            rows = pl.concat([replayed.sort("stage", "uid").lazy(), rows.filter(origin="current")])
            self.facts["on_policy"] = {"replaced": gold.height, "dropped": drops.height}
            if drops.height:
                self.screen.note(f"{drops.height:,} drawn rows are left out: the policy has no good answer to them "
                                 "(replay.fallback: drop); drops.parquet lists them")  # fmt: skip
        completions = self.completions(rows, rolled, gold)
        augmentations = self.augmented(rows, tasks)
        return PolicyWork(rows, completions, augmentations, drops, self.facts)

    # --- rollouts ---

    def roll(self, rows: pl.LazyFrame) -> pl.DataFrame | None:
        """Stages rollouts and rewards: the table ROLLOUTS with reward; None where none are asked for."""
        config, seed = self.config.rollouts, self.config.seed
        if config is None or self.policy is None:
            return None
        chosen = self.to_roll(rows)
        prompts = in_batches(chosen)
        fits, skipped = that_fit(chosen, prompts, self.policy, config.max_new_tokens, self.config.too_long, "a rollout")
        prompts = [prompts[i] for i in fits]
        left = self.policy.sized(config.block).to_generate(prompts, sampling_of(config, seed))
        with self.stage("rollouts", left, len(prompts), "prompts") as done:
            rolled = rollouts(self.policy, prompts, config, seed, done)
        reward = self._reward()
        left = reward_blocks(rolled, chosen, reward, self.store).left
        with self.stage("rewards", left, rolled.height, "rollouts") as done:
            rolled = rolled.with_columns(reward=rewards(rolled, chosen, reward, self.store, done))
        self._note(skipped, "prompts are too long for rollouts")
        if (
            config.k > 1
            and rolled.height
            and rolled.group_by("source_uid").agg(pl.col("text").n_unique())["text"].max() == 1
        ):
            self.screen.note(
                f"all {config.k} rollouts are alike for every prompt: a sure policy, or a server that does not sample "
                "(it may follow its own generation_config.json)"
            )
        if n := rolled["token_logps"].null_count():
            self.screen.note(
                f"{n:,} rollouts have no log-probabilities, so their bucket is `normal`: the server gives none, or "
                "only at temperature 1 with top_p 1"
            )
        if n := rolled["reward"].null_count():
            self.screen.note(f"{n:,} rewards are not a number: those rollouts are unranked and in the bucket `normal`")
        spread = rolled.join(chosen.select(pl.col("uid").alias("source_uid"), "task"), on="source_uid", how="left")
        spread = spread.group_by("task").agg(pl.col("reward").n_unique())
        if n := spread.filter(pl.col("reward") < 2).height:
            self.screen.note(f"{n} of {spread.height} tasks have one reward for every rollout: nothing can be told "
                             "from it (all ranks are 1; over their task all buckets are `normal`)")  # fmt: skip
        self.facts["rollouts"] = {
            **asdict(sampling_of(config, seed)), "prompts": len(prompts), "skipped": sorted(skipped),
            "reward": reward.fingerprint, "unfinished": int((~rolled["finished"]).sum()),
            "no_reward": rolled["reward"].null_count(), "no_logps": rolled["token_logps"].null_count(),
            **self._usage(rolled),
        }  # fmt: skip
        return rolled

    def to_roll(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """Rows whose prompts are answered: all replayed ones where their answers are to be the policy's."""
        config, seed = self.config.rollouts, self.config.seed
        assert config is not None
        found = some_rows(rows, config.origins, config.per_task, seed, "rollouts")
        if self.config.replay.completions == "policy":
            every = some_rows(rows, ("replay",), None, seed, "rollouts")
            found = pl.concat([found.join(every.select("uid"), on="uid", how="anti"), every])
        return found

    # --- completions ---

    def completions(self, rows: pl.LazyFrame, rolled: pl.DataFrame | None, gold: pl.DataFrame) -> pl.DataFrame:
        """The manifest's table: answers that the data brings, answers that gave way to rollouts, rollouts."""
        parts = [self.brought(rows), gold.with_columns(origin=pl.lit("gold"))]
        if rolled is not None:
            kept = rows_of(rolled, rows.select("source_uid"))
            parts.append(self.judged(rolled.join(kept, on="source_uid", how="semi"), rows))
        parts.append(pl.DataFrame(schema={"number": pl.Int32}))
        every = pl.concat(parts, how="diagonal")
        kept = rows_of(every, rows.select("source_uid", "uid", "task", "stage", "ranked_by"))
        every = every.join(kept.drop("uid"), on="source_uid", how="left", maintain_order="left")
        every = every.with_columns(origin=pl.coalesce("origin", "ranked_by"))
        final = dict(kept.select("source_uid", "uid").iter_rows())
        every = candidates.with_uids(every, final).sort("stage", "prompt_uid", "origin", "rank", "number", "uid",
                                                       nulls_last=True)  # fmt: skip
        return COMPLETIONS.fit(self.by_hand(every))

    def by_hand(self, every: pl.DataFrame) -> pl.DataFrame:
        """Rollouts in the buckets that a person gave them; those are in the provenance, as `check` reads them there."""
        if self.config.buckets.overrides is None:
            return every
        given = read_overrides(self.config.resolve(self.config.buckets.overrides))
        mine = every.filter(pl.col("uid").is_in(list(given)), origin="policy")["uid"].to_list()
        if unknown := len(given) - len(mine):
            self.screen.note(f"{unknown:,} of {len(given):,} overrides name no rollout of this build: the policy, its "
                             "draws or the prompts are others now")  # fmt: skip
        applied = {uid: given[uid] for uid in sorted(mine)}
        if "buckets" in self.facts:
            self.facts["buckets"]["overrides"] = applied
        new = pl.col("uid").replace_strict(applied, default=None, return_dtype=pl.String)
        return every.with_columns(bucket=pl.coalesce(pl.when(pl.col("uid").is_in(mine)).then(new), "bucket"))

    def brought(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """Ranked answers of the data, with log-probabilities where there is a policy that can measure them."""
        ranked = rows.filter(pl.col("candidates").list.len() > 0).with_columns(uid="source_uid")
        answers = candidates.brought(ranked.select("uid", "candidates").collect()).rename({"score": "reward"})
        scored = answers.with_columns(
            reward_id=pl.when(pl.col("reward").is_not_null()).then(pl.lit("source score")),
            origin=pl.lit(None, dtype=pl.String),
        )
        if not self.config.candidates.score or self.policy is None or not scored.height:
            return scored
        if not self.policy.scores:
            self.screen.note("log-probabilities of the data's ranked answers are not measured: a server cannot")
            return scored
        sources = ranked.collect()
        pairs = candidates.pairs_of(answers, sources)
        with self.stage("score", self.policy.to_score(pairs), len(pairs), "answers") as done:
            found = self.policy.score(pairs, done)
        out = sorted({p.uid for (p, _), c in zip(pairs, found, strict=True) if c is None})
        if out and self.config.too_long == "error":
            row = sources.filter(uid=out[0]).row(0, named=True)
            raise InputError(
                f"task {row['task']!r}: row {row['row']}: a ranked answer does not fit the policy's context behind its "
                "prompt, so its log-probability cannot be measured",
                remedy="shorten the row, set candidates.score=false, or set too_long: skip",
            )
        self._note(out, "rows have ranked answers that do not fit the policy's context; log-probabilities are null")
        self.facts["scored"] = {"answers": len(pairs), "skipped": out}
        return self._by_policy(candidates.measured(scored, found))

    def judged(self, rolled: pl.DataFrame, rows: pl.LazyFrame) -> pl.DataFrame:
        """Rollouts with rank, similarity, side and bucket."""
        config = self.config.candidates
        sources = rows_of(rolled, rows.select("source_uid", "task", "references")).with_columns(uid="source_uid")
        sampling = self.config.rollouts
        assert sampling is not None
        found = self._by_policy(rolled).with_columns(
            origin=pl.lit("policy"),
            temperature=pl.lit(sampling.temperature, dtype=pl.Float64),
            top_p=pl.lit(sampling.top_p, dtype=pl.Float64),
            reward_id=pl.lit(self.facts["rollouts"]["reward"]),
        )
        if config.rank:
            found = found.with_columns(rank=candidates.ranks(found))
        if config.similarity:
            embeddings, texts = self._embeddings(), candidates.compared(found, sources)
            embeddings.extend(t for t in (*texts[0], *texts[1]) if t.strip())
            with self.stage("embed", sum(len(b.texts) for b in embeddings.missing()), found.height, "answers") as done:
                embeddings.compute(done)
            value = candidates.similarity(found, sources, embeddings)
            found = found.with_columns(similarity=value, side=candidates.sides(value, config.threshold))
            self.facts["similarity"] = {"embedder": embeddings.embedder.fingerprint, "threshold": config.threshold}
        buckets = self.config.buckets
        rule = Rule(buckets.k, buckets.logp, buckets.population)
        tasked = found.join(sources.select("source_uid", "task"), on="source_uid", how="left", maintain_order="left")
        bucket, stats = rule.assign(tasked)
        self.facts["buckets"] = {"rule": asdict(rule), "statistics": {name: asdict(s) for name, s in stats.items()}}
        return found.with_columns(bucket=bucket)

    def _by_policy(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The columns that say whose numbers these are, null where there are none."""
        assert self.policy is not None
        measured, told = pl.col("token_logps").is_not_null(), pl.col("token_ids").is_not_null()
        wrote = pl.lit("finished" in frame.columns)
        return frame.with_columns(
            policy=pl.when(measured | wrote).then(pl.lit(self.policy.fingerprint)),
            tokenizer=pl.when(told).then(pl.lit(self.policy.tokenizer_fingerprint, dtype=pl.String)),
        )

    # --- augmentation ---

    def augmented(self, rows: pl.LazyFrame, tasks: Sequence[TaskRows]) -> pl.DataFrame:
        """Stage augment: every rewrite with its scores, kept or not, as the manifest's table."""
        config, seed = self.config.augment, self.config.seed
        if config is None or self.policy is None:
            return AUGMENTATIONS.empty()
        policy, sampling = self.policy.sized(config.block), augment.sampling_of(config, seed)
        asked, skipped = self.to_rewrite(rows)
        ask = [q[2] for q in asked]
        with self.stage("rewrite", policy.to_generate(ask, sampling), len(ask), "prompts") as done:
            found = [some[0] for some in policy.generate(ask, sampling, done)]
        usable = [i for i, c in enumerate(found) if augment.usable(c, "rewrite") is None]
        prompts = [augment.rewritten(asked[i], found[i]) for i in usable]
        # a rewrite that is itself too long is the policy's doing, not the user's: it is a fault of that one row
        fit, _ = that_fit(rows, prompts, policy, config.max_new_tokens, "skip", "an answer")
        answers: dict[str, Completion | str] = {
            asked[i][2].uid: "the rewrite leaves no room for an answer" for i in usable
        }
        those = [prompts[i] for i in fit]
        with self.stage("answer", policy.to_generate(those, sampling), len(those), "rewrites") as done:
            for i, some in zip(fit, policy.generate(those, sampling, done), strict=True):
                answers[asked[usable[i]][2].uid] = some[0]
        frame = augment.rewrites(asked, found, answers)
        texts = augment.corpus([t.scan() for t in tasks], config.corpus)
        left = augment.mi_blocks(frame, texts, self.store).left
        with self.stage("MI", left, frame.height, "rewrites") as done:
            frame = augment.information(frame, texts, self.store, done)
        self._note(skipped, "rewrites were not asked for: their prompts are too long")
        every = [*found, *(a for a in answers.values() if isinstance(a, Completion))]
        self.facts["augment"] = {
            **asdict(sampling), "templates": augment.templates_of(config), "corpus": len(texts), "theta": config.theta,
            "skipped": sorted(skipped), **self._usage(pl.DataFrame([vars(c) for c in every], infer_schema_length=None)),
        }  # fmt: skip
        parents = pl.DataFrame({"uid": frame["parent_uid"].unique()}).lazy()
        return finish_augmentations(frame, rows.join(parents, on="uid", how="semi").collect(), config.theta)

    def to_rewrite(self, rows: pl.LazyFrame) -> tuple[list[augment.Question], list[str]]:
        """(what the policy is asked to rewrite, uids of what is too long for it)."""
        config = self.config.augment
        if config is None or self.policy is None:
            return [], []
        able = augment.rewritable(rows)
        chosen = some_rows(able, config.origins, config.per_task, self.config.seed, "augment")
        asked = augment.questions(chosen, config)
        fits, skipped = that_fit(chosen, [q[2] for q in asked], self.policy, config.max_new_tokens,
                                 self.config.too_long, "a rewrite")  # fmt: skip
        return [asked[i] for i in fits], skipped

    # --- helpers ---

    def _usage(self, frame: pl.DataFrame) -> dict[str, Any]:
        assert self.policy is not None and self.config.policy is not None
        if frame.is_empty():
            return usage(0, 0, 0, self.config.policy)
        n_in, n_out = (int(frame[c].fill_null(0).sum()) for c in ("prompt_tokens", "n_tokens"))
        return usage(frame.height, n_in, n_out, self.config.policy)

    def _note(self, uids: Sequence[str], text: str) -> None:
        if uids:
            self.screen.note(f"{len(uids):,} {text} (too_long: skip; the provenance lists them)")

    @contextmanager
    def stage(self, name: str, left: int, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A progress line over what is left, or one word where nothing is."""
        if not left:
            self.screen.cached(name, f"{total:,} {unit}")
            yield lambda n: None
        else:
            with self.screen.stage(name, left, unit) as advance:
                yield advance


def rows_of(answers: pl.DataFrame, rows: pl.LazyFrame) -> pl.DataFrame:
    """Those of `rows` that some answers are of, by `source_uid`."""
    return rows.join(answers.lazy().select("source_uid").unique(), on="source_uid", how="semi").collect()


def on_policy(
    rows: pl.DataFrame, rolled: pl.DataFrame, config: BuildConfig
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """(rows with the policy's best rollouts as answers, the answers that gave way, rows that were dropped)."""
    found = best(rolled, config.replay.min_reward)
    top = dict(rolled.group_by("source_uid").agg(pl.col("reward").max()).iter_rows())
    every, gold, drops = [], [], []
    for row in rows.iter_rows(named=True):
        uid = row["uid"]
        tools = bool(row["tools"]) or any(m["tool_calls"] for m in row["completion"])  # a call is more than its text
        if row["origin"] != "replay" or tools or (uid not in found and config.replay.fallback == "gold"):
            every.append(row)
        elif uid not in found:
            drops.append({**row, "step": "rollout", "reason": _no_rollout(row, uid in top, config.replay.min_reward),
                          "score": top.get(uid)})  # fmt: skip
        else:
            answer = {**dict.fromkeys(row["completion"][0]), "role": "assistant", "content": found[uid]}
            ranked = [(c["text"], c["rank"]) for c in row["candidates"]]
            new = sample_uid(row["task"], row["prompt"], [answer], row["references"], row["tools"], candidates=ranked)
            every.append({**row, "uid": new, "completion": [answer], "written_by": "policy"})
            gold.append({"source_uid": uid, "text": row["references"][0]})
    schema: Any = {name: dtype for name, dtype in rows.schema.items()}
    dropped = pl.DataFrame([{n: d.get(n) for n in DROPS.schema} for d in drops], schema=DROPS.schema)
    return (pl.DataFrame(every, schema=schema),
            pl.DataFrame(gold, schema={"source_uid": pl.String, "text": pl.String}), dropped)  # fmt: skip


def _no_rollout(row: dict[str, Any], tried: bool, min_reward: float | None) -> str:
    if not row["prompt"]:
        return "plain text: there is no prompt that the policy could answer"
    if not tried:
        return "its prompt was too long for a rollout"
    return "no rollout is finished and not empty" + ("" if min_reward is None else f" with a reward ≥ {min_reward:g}")


def finish_augmentations(frame: pl.DataFrame, rows: pl.DataFrame, theta: float) -> pl.DataFrame:
    """The manifest's table from REWRITES with scores: uids, tasks, the decision; by parent and template."""
    from curate.score import filter_score

    parents = rows.select(pl.col("uid").alias("parent_uid"), "task", "stage")
    every = frame.join(parents, on="parent_uid", how="left", maintain_order="left")
    scores = [None if a is None or b is None else filter_score(a, b)
              for a, b in every.select("mi_input", "mi_output").iter_rows()]  # fmt: skip
    uids = [augment.rewrite_uid(row["task"], row) for row in every.iter_rows(named=True)]
    every = every.with_columns(uid=pl.Series(uids, dtype=pl.String), score=pl.Series(scores, dtype=pl.Float64)).pipe(
        augment.decided, theta
    )
    return AUGMENTATIONS.fit(every).sort("parent_uid", "template")


def usage(requests: int, prompt_tokens: int, completion_tokens: int, model: ModelConfig) -> dict[str, Any]:
    """Token counts, and what they cost where the configuration states prices (a million tokens each).

    Counts are those of the answers that the manifest rests on, whether they were cached or not, so that the same build
    states the same numbers.
    """
    found: dict[str, Any] = {"requests": requests, "prompt_tokens": prompt_tokens,
                             "completion_tokens": completion_tokens}  # fmt: skip
    if model.price_in is not None or model.price_out is not None:
        price = prompt_tokens * (model.price_in or 0) + completion_tokens * (model.price_out or 0)
        found["cost"] = round(price / 1e6, 6)
    return found
