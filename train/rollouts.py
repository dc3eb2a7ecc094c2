"""Phases of reinforcement learning: completions of the policy, their rewards and log-probabilities, on disk.

It owns what is measured before a phase is trained on, and its folder `rollouts/phase-N`: a manifest (completions with
reward and bucket, so that `curate check`, notebooks and the report read it like one of `curate build`) and
`samples.safetensors`, from which a run that was killed goes on with the same bits. What samples are worth (advantages,
weights) is the method's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from curate.errors import InputError
from curate.manifest import Manifest, Rule, moved_inside, part, part_card, sequence_logp, write
from curate.manifest.schema import TABLES, completion_uid
from curate.models import Completion, LocalModel, Prompt, Sampling
from curate.models.local import tokenizer_fingerprint
from train.ahead import Ahead
from train.folder import whole
from train.layout import Layout, of_samples
from train.logprobs import Reference, token_values
from train.parallel import first, share, together
from train.phases import Phases
from train.server import Server, gap, told

LARGEST = 1e12  # of a reward
FOLDER, SAMPLES = "rollouts", "samples.safetensors"
BUCKETS = ("high_performance", "overfitting", "high_variance", "noisy", "normal")
ON_DISK = ("tokens", "mask", "logps", "reference", "anchor", "values", "row", "score", "ended", "z_p", "z_r")


@dataclass
class Samples:
    """n samples of a phase; token-level tensors are [n, t], t the longest answer.

    Attributes:
        prompts: tokens of each prompt.
        tokens, mask: of the answers, padded on the right.
        logps: log π of the policy that drew them, nats, at the sampling temperature.
        reference: log π of the KL's reference; anchor: of the retention's.
        values: V before each token; 0 without a value head.
        row: [n] which example was answered; score: [n] rewards; ended: [n] 1 where the end token came.
        z_p, z_r: [n] standard scores of mean log-probability and reward over the phase.
        bucket: [n] names.
        gap: how far a server's log-probabilities are from `logps`, nats a token; None: not known.
        behaviour: [n, t] log μ of the weights that drew, as the server told it, nats; NaN: it did not. Asynchronous
            phases only, whose `logps` are of the policy where the phase begins; as is `version`.
        version: [n] phase whose weights drew a sample.
    """

    prompts: list[Any]
    tokens: Tensor
    mask: Tensor
    logps: Tensor
    reference: Tensor
    anchor: Tensor
    values: Tensor
    row: Tensor
    score: Tensor
    ended: Tensor
    z_p: Tensor
    z_r: Tensor
    bucket: list[str]
    gap: float | None = None
    behaviour: Tensor | None = None
    version: Tensor | None = None

    def answers(self) -> list[Any]:
        """Tokens of each answer."""
        return [row[mask].numpy().astype(np.int32) for row, mask in zip(self.tokens, self.mask, strict=True)]


@dataclass
class Rollouts:
    """Makes phases.

    Attributes:
        phases: which prompts a phase answers.
        manifest: whose samples are the prompts.
        examples: the same as tokens: `row` counts them.
        tokenizer: of the policy.
        sampling: k, temperature, max_new_tokens, seed.
        reward: says how good an answer is.
        rule: of the buckets.
        reference, anchor: models, or contexts in which the policy itself is one; an anchor of None is the policy that
            drew the samples.
        out: the run's folder.
        batch_size: sequences of a forward pass.
        name: of the policy, in the manifests.
        unjudged: the reward of a completion to which `reward` gives no number; None: that is an error.
        offline: nothing is drawn or judged: the manifest's own rollouts, with the log-probabilities that they have.
        layout: how samples share the rows of a pass.
        server: draws the completions instead of the policy in memory.
        staleness: phases by which its weights may be older: it is asked ahead. `total`: phases of the run.
        tell: shows how far a long phase has come.
        lockstep: the model is sharded, so that all processes must make the same passes: each draws and measures all.
    """

    phases: Phases
    manifest: Manifest
    examples: Any
    tokenizer: Any
    sampling: Sampling
    reward: Any
    reward_id: str
    rule: Rule
    reference: Reference
    anchor: Reference | None
    out: Path
    batch_size: int
    name: str
    unjudged: float | None = None
    offline: bool = False
    layout: Layout = field(default_factory=Layout)
    server: Server | None = None
    staleness: int = 0
    total: int = 1
    tell: Callable[[str], None] = lambda text: None
    lockstep: bool = False
    ahead: Ahead | None = field(init=False)
    rows: dict[str, dict[str, Any]] = field(init=False)
    stored: dict[str, list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.stored = stored(self.manifest, self.sampling.temperature) if self.offline else {}
        self.rows = {row["uid"]: row for row in self.manifest.samples.iter_rows(named=True)}
        self.ahead = None
        if self.server is not None and self.staleness:
            self.ahead = Ahead(self.server, self._own, self.sampling, self.staleness, self.total)

    def phase(self, number: int, model: Any, head: Any, critic: Any) -> Samples:
        """The samples of a phase: read where it is on disk, else drawn, judged, measured and written.

        `head` makes values of the last hidden state of the policy, or of `critic`; None: there are no values.

        Raises:
            InputError: a reward that cannot be used, with the uid of its prompt; a full disk.
        """
        folder = self.out / FOLDER / f"phase-{number:05d}"
        kept = together(lambda: self._read(folder) if first() and (folder / SAMPLES).is_file() else None)[0]
        early = self.ahead.begin(number, model, kept is None) if self.ahead is not None else []
        if kept is not None:
            return kept
        rows, training = self.phases.rows(number).tolist(), model.training
        uids = self._uids(number)
        model.eval()
        try:
            if self.offline:
                drawn, scores = self._stored(number, uids)
            else:
                drawn = [each for _, each in early] or self._fresh(number, uids, model)
                scores = self._scores(uids, drawn)
            found = self._measured(rows, drawn, scores, model, head, critic)
            if early:
                found.behaviour, found.version = told(drawn, found.mask), torch.tensor([by for by, _ in early])
            by_hand = self._by_hand(number, uids, found) if self.offline else {}
        finally:
            model.train(training)
        together(lambda: self._kept(folder, number, uids, drawn, found, by_hand) if first() else None)
        return found

    # --- completions and rewards ---

    def _kept_rows(self, number: int, uids: Sequence[str]) -> list[dict[str, Any]]:
        """Offline: the stored rollout of each sample; each time that a prompt comes round the next k of its own."""
        k, round_ = self.sampling.k, number * self.phases.prompts // self.phases.mixture.length
        found = []
        for uid in uids[::k]:
            mine = self.stored[uid]
            found += [mine[(round_ * k + j) % len(mine)] for j in range(k)]
        return found

    def _stored(self, number: int, uids: Sequence[str]) -> tuple[list[Completion], list[float]]:
        kept = self._kept_rows(number, uids)
        return [Completion(*(each[name] for name in _READ)) for each in kept], [each["reward"] for each in kept]

    def _by_hand(self, number: int, uids: Sequence[str], found: Samples) -> dict[int, str]:
        """The samples that a person put into a bucket: moved there, so that their weights are that bucket's."""
        given = self.manifest.provenance.get("buckets", {}).get("overrides", {})
        named = [each["uid"] for each in self._kept_rows(number, uids)]
        moved = {i: given[uid] for i, uid in enumerate(named) if uid in given}
        for i, bucket in moved.items():
            near = [float(torch.nan_to_num(z[i])) for z in (found.z_p, found.z_r)]
            found.z_p[i], found.z_r[i] = moved_inside(bucket, near[0], near[1], self.rule.k)
            found.bucket[i] = bucket
        return moved

    def _uids(self, number: int) -> list[str]:
        """Whose prompt each sample of a phase answers."""
        return [self.examples.uid[int(row)] for row in self.phases.rows(number)]

    def _own(self, number: int) -> list[Prompt]:
        """This process's share of the prompts of a phase."""
        prompts = self._asked(number, self._uids(number))
        return prompts[share(len(prompts))]

    def _fresh(self, number: int, uids: Sequence[str], model: Any) -> list[Completion]:
        """Completions of a phase; each process draws its share of the prompts, of a sharded model all."""
        prompts = self._asked(number, uids)
        own = share(len(prompts))
        if self.server is not None:
            server = self.server
            together(lambda: server.refresh(model, number) if first() else None)
            return _joined(together(lambda: server.draw(prompts[own], self.sampling)))
        if self.lockstep:
            return self._draw(prompts, model)
        return _joined(together(lambda: self._draw(prompts[own], model)))

    def _scores(self, uids: Sequence[str], drawn: Sequence[Completion]) -> list[float]:
        """Rewards; each process judges its share."""
        k = self.sampling.k
        own = share(len(drawn) // k)
        mine = slice(own.start * k, own.stop * k)
        return _joined(together(lambda: self._judge(uids[mine], [each.text for each in drawn[mine]])))

    def _asked(self, number: int, uids: Sequence[str]) -> list[Prompt]:
        """The prompts of a phase: with a uid of its own each time that one is asked, as draws depend on it alone."""
        prompts, asked = list[Prompt](), dict[str, int]()
        for uid in uids[:: self.sampling.k]:
            asked[uid] = asked.get(uid, 0) + 1
            again = f"/{asked[uid]}" if asked[uid] > 1 else ""
            prompts.append(Prompt(f"{uid}/{number}{again}", self.rows[uid]["prompt"], self.rows[uid]["tools"]))
        return prompts

    def _draw(self, prompts: Sequence[Prompt], model: Any) -> list[Completion]:
        """A completion of each sample; the k of a prompt stand together."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        policy = LocalModel.around(plain, self.tokenizer, self.name, self.batch_size)
        block, found = max(1, 8 * self.batch_size // self.sampling.k), list[Completion]()
        for start in range(0, len(prompts), block):
            found += _joined(policy.generate(prompts[start : start + block], self.sampling))
            if len(prompts) > block:
                self.tell(f"drawn {len(found):,} of {len(prompts) * self.sampling.k:,}")
        return found

    def _judge(self, uids: Sequence[str], texts: Sequence[str]) -> list[float]:
        if not uids:
            return []
        rows = [self.rows[uid] for uid in uids]
        prompts = [Prompt(row["uid"], row["prompt"], row["tools"]) for row in rows]
        try:
            found = list(self.reward(prompts, list(texts), [row["references"] for row in rows]))
        except InputError:
            raise
        except Exception as error:  # the user's own function may raise anything
            raise InputError(
                f"reward {self.reward_id}: {type(error).__name__}: {str(error)[:300]}; the phase begins with uid "
                f"{uids[0]}",
                remedy="mend the reward: the step was not taken, and the same command goes on from the last checkpoint",
            ) from error
        if len(found) != len(texts):
            raise InputError(f"reward {self.reward_id}: {len(found)} rewards for {len(texts)} completions")
        judged = [value is not None and math.isfinite(value) for value in found]
        if self.unjudged is None and not all(judged):
            at = judged.index(False)
            raise InputError(
                f"reward {self.reward_id}: no finite number for a completion of uid {uids[at]}: {texts[at][:80]!r}",
                remedy="the step was not taken; mend the reward, or set `unjudged` to what such completions are worth",
            )
        large = [i for i, v in enumerate(found) if judged[i] and abs(v) > LARGEST]
        if large:
            raise InputError(
                f"reward {self.reward_id}: {found[large[0]]:.4g} for a completion of uid {uids[large[0]]}",
                remedy=f"scale it: its square must fit into a float32, so {LARGEST:g} is the most",
            )
        return [float(v) if sound else float(self.unjudged or 0) for v, sound in zip(found, judged, strict=True)]

    # --- what the models say ---

    def _measured(
        self, rows: Sequence[int], drawn: Sequence[Any], scores: Sequence[float], model: Any, head: Any, critic: Any
    ) -> Samples:
        prompts = [self._prompt(int(row)) for row in rows]
        answers = [np.array(each.token_ids, np.int32) for each in drawn]
        n, t = len(answers), max(map(len, answers))
        tokens, mask = torch.zeros(n, t, dtype=torch.long), torch.zeros(n, t, dtype=torch.bool)
        for i, answer in enumerate(answers):
            tokens[i, : len(answer)], mask[i, : len(answer)] = torch.from_numpy(answer.astype(np.int64)), True
        whole, k = share(n // self.sampling.k), self.sampling.k
        at = slice(0, n) if self.lockstep else slice(whole.start * k, whole.stop * k)

        def of(asked: Any, other: Reference | None, head: Any) -> list[Tensor]:
            """[log π, V] [n, t]; each process measures its share."""
            own = self._of(rows[at], prompts[at], answers[at], mask[at], asked, other, head)
            return own if self.lockstep else [torch.cat(each) for each in zip(*together(lambda: own), strict=True)]

        logps, values = of(model, None, head if critic is None else None)
        if self.offline:  # of the policy that drew them
            logps = logps.clone()
            for i, each in enumerate(drawn):
                logps[i, : len(answers[i])] = torch.tensor(each.token_logps)
        if critic is not None:
            values = of(critic, None, head)[1]
        reference = of(model, self.reference, None)[0]
        anchor = logps
        if self.anchor is not None:
            anchor = reference if self.anchor is self.reference else of(model, self.anchor, None)[0]
        listed = [row[m].tolist() for row, m in zip(logps, mask, strict=True)]
        frame = pl.DataFrame({"token_logps": listed, "reward": scores, "task": [""] * n, "batch": [0] * n})
        bucket, stats = self.rule.assign(frame)  # over the phase
        z_p, z_r = stats["0"].z([sequence_logp(each, self.rule.logp) for each in listed], scores)
        return Samples(
            prompts, tokens, mask, logps, reference, anchor, values, torch.tensor([int(row) for row in rows]),
            torch.tensor(scores, dtype=torch.float64), torch.tensor([float(bool(each.finished)) for each in drawn]),
            torch.from_numpy(z_p), torch.from_numpy(z_r), bucket.to_list(),
            gap(drawn, logps, mask) if self.server is not None else None,
        )  # fmt: skip

    def again(self, samples: Samples, model: Any) -> Tensor:
        """[n, t] log π of a phase's samples under the policy as it is now."""
        training, n = model.training, len(samples.row)
        model.eval()
        at = slice(0, n) if self.lockstep else share(n)
        try:
            own = self._of(samples.row[at].tolist(), samples.prompts[at], samples.answers()[at], samples.mask[at],
                           model, None, None)[0]  # fmt: skip
        finally:
            model.train(training)
        return own if self.lockstep else torch.cat(together(lambda: own))

    def _prompt(self, row: int) -> Any:
        return self.examples.row_tokens(row)[: int(self.examples.first_target[row])]

    @torch.no_grad()
    def _of(
        self, rows: Sequence[int], prompts: list[Any], answers: list[Any], mask: Tensor, model: Any,
        other: Reference | None, head: Any,
    ) -> list[Tensor]:  # fmt: skip
        """[log π, V] of the answers' tokens, [n, t] each; of another model, or inside a context."""
        logps, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
        asked, inside = (other, None) if isinstance(other, torch.nn.Module) else (model, other)
        device = next(asked.parameters()).device
        for start in range(0, len(prompts), self.batch_size):
            at = slice(start, start + self.batch_size)
            laid = self.layout.batch(prompts[at], answers[at], rows[at])
            batch = {k: v.to(device) for k, v in laid.items()}
            of: Any = ("logps", "values") if head is not None else ("logps",)

            def ask(batch: Any = batch, of: Any = of) -> Any:
                return token_values(asked, batch, of, value_head=head, temperature=self.sampling.temperature)

            if inside is None:
                found = ask()
            else:
                with inside():
                    found = ask()
            logps[at] = of_samples(found["logps"], batch, mask[at].to(device)).float().cpu()
            if head is not None:
                values[at] = of_samples(found["values"], batch, mask[at].to(device)).float().cpu()
        return [logps, values]

    # --- on disk ---

    @property
    def _on_disk(self) -> tuple[str, ...]:
        return ON_DISK if self.ahead is None else (*ON_DISK, "behaviour", "version")

    def _kept(
        self, folder: Path, number: int, uids: Sequence[str], drawn: Sequence[Any], found: Samples,
        by_hand: Mapping[int, str],
    ) -> None:  # fmt: skip
        with whole(folder / f".{SAMPLES}", "the same command goes on from its last checkpoint"):
            self._write(folder, number, uids, drawn, found, by_hand)

    def _write(
        self, folder: Path, number: int, uids: Sequence[str], drawn: Sequence[Any], found: Samples,
        by_hand: Mapping[int, str],
    ) -> None:  # fmt: skip
        seen: dict[tuple[str, str], int] = {}
        rows = []
        own = {"policy": f"{self.name}, phase {number}", "tokenizer": tokenizer_fingerprint(self.tokenizer),
               "temperature": self.sampling.temperature, "reward_id": self.reward_id}  # fmt: skip
        stored = self._kept_rows(number, uids) if self.offline else []
        for i, (uid, each) in enumerate(zip(uids, drawn, strict=True)):
            index = seen[uid, each.text] = seen.get((uid, each.text), -1) + 1
            sample = self.rows[uid]
            rows.append({
                "uid": completion_uid(uid, "policy", each.text, index), "prompt_uid": uid, "task": sample["task"],
                "stage": sample["stage"], "origin": "policy", "text": each.text, "token_ids": each.token_ids,
                "token_logps": found.logps[i][found.mask[i]].tolist(), "n_tokens": each.n_tokens,
                "top_p": self.sampling.top_p,
                "finished": bool(each.finished), "batch": number, "reward": float(found.score[i]),
                "bucket": found.bucket[i], **({k: stored[i][k] for k in own} if stored else own),
            })  # fmt: skip
        columns = TABLES["completions"].columns
        completions = pl.DataFrame(rows, schema={c: columns[c].dtype for c in columns}).with_columns(
            rank=pl.col("reward").rank("min", descending=True).over("prompt_uid").cast(pl.Int32)
        )
        frames, provenance = part(self.manifest, set(uids), completions.sort("uid"), f"rollouts of phase {number}")
        _, stats = self.rule.assign(completions)
        facts: dict[str, Any] = {"rule": asdict(self.rule), "statistics": {n: asdict(s) for n, s in stats.items()}}
        if by_hand:
            facts["overrides"] = {rows[i]["uid"]: bucket for i, bucket in by_hand.items()}
        said = f"{len(rows)} completions of {len(set(uids))} prompts."
        card = part_card(f"Rollouts of phase {number}", said, frames, provenance)
        write(folder, frames, {**provenance, "buckets": facts}, card)
        held = {name: getattr(found, name).contiguous().clone() for name in self._on_disk}
        held["bucket"] = torch.tensor([BUCKETS.index(name) for name in found.bucket])
        save_file(held, folder / f".{SAMPLES}")
        (folder / f".{SAMPLES}").replace(folder / SAMPLES)

    def _read(self, folder: Path) -> Samples:
        try:
            held: dict[str, Any] = load_file(folder / SAMPLES)
            complete = held.keys() == {*self._on_disk, "bucket"} and int(held["row"].max()) < len(self.examples)
        except (SafetensorError, OSError):
            complete = False
        if not complete:
            raise InputError(f"{folder / SAMPLES}: not the samples of this run's phase",
                             remedy="put the file back, or begin again with resume=false")  # fmt: skip
        bucket = [BUCKETS[i] for i in held.pop("bucket").tolist()]
        return Samples([self._prompt(row) for row in held["row"].tolist()], bucket=bucket, **held)


def _joined(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return [each for part in parts for each in part]


_READ = ("text", "token_ids", "token_logps", "n_tokens", "finished")
_WHOSE = ("policy", "tokenizer", "temperature", "reward_id")


def stored(manifest: Manifest, temperature: float) -> dict[str, list[dict[str, Any]]]:
    """The rollouts of each prompt that have tokens, log-probabilities and a reward, in the order of their uids.

    Raises:
        InputError: they were drawn at other temperatures, or judged by several rewards.
    """
    rows = manifest.completions.filter(
        pl.col("reward").is_finite(), pl.col("token_logps").list.len() > 0, pl.col("token_ids").list.len() > 0,
        pl.col("temperature") > 0, pl.col("top_p") == 1.0, origin="policy",
    ).sort("prompt_uid", "uid")  # fmt: skip
    if others := sorted(set(rows["temperature"]) - {temperature}):
        raise InputError(
            f"{manifest.folder}: rollouts drawn at temperature {others[0]:g}; this run would take them for draws at "
            f"{temperature:g}",
            remedy=f"set rollouts.temperature={others[0]:g}",
        )
    if (n := rows["reward_id"].n_unique()) > 1:
        raise InputError(
            f"{manifest.folder}: rollouts judged by {n} rewards: {rows['reward_id'].unique().sort().to_list()}",
            remedy="rewards have a scale each: train on rollouts of one",
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.select("uid", "prompt_uid", "reward", *_READ, *_WHOSE).iter_rows(named=True):
        found.setdefault(row["prompt_uid"], []).append(row)
    return found
