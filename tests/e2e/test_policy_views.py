"""A manifest that a policy took part in, as others see it: `datasets`, pairs of answers, a diff, a notebook."""

import re
from collections import Counter
from html import unescape

import pytest
import yaml
from datasets import load_dataset
from policy_runs import BUCKETS

from curate.diff import diff
from curate.export import Skipped, rows_of
from curate.manifest import TABLES, part, read, write
from curate.manifest.card import card
from curate.refilter import refilter


def test_every_table_with_rows_loads_by_its_name(small, tmp_path):
    head = yaml.safe_load((small.folder / "README.md").read_text().split("---\n")[1])
    configs = [each["config_name"] for each in head["configs"]]
    assert configs == [name for name in TABLES if getattr(small, name).height]
    assert {"samples", "completions", "augmentations"} <= set(configs)
    assert head["language_creators"] == ["found", "machine-generated"] and "rollouts" in head["tags"]
    for name in configs:
        data = load_dataset(str(small.folder), name, split="train", cache_dir=str(tmp_path))
        frame = getattr(small, name)
        assert data.column_names == frame.columns
        key = TABLES[name].key
        assert [tuple(row[k] for k in key) for row in data] == frame.select(key).rows()


@pytest.mark.parametrize("pairs", ["rank", "side"])
def test_pairs_of_rollouts(compared, pairs):
    """Each row's answers are of one prompt, and the chosen one is better by the stored order."""
    rows = list(rows_of(compared, "trl-dpo", pairs=pairs))
    written = [r for r in rows if not isinstance(r, Skipped)]
    skipped = {r.uid for r in rows if isinstance(r, Skipped)}
    assert {r["uid"] for r in written} | skipped == set(compared.samples["uid"])
    assert not {r["uid"] for r in written} & skipped
    answers = {row["uid"]: row for row in compared.completions.iter_rows(named=True)}
    for row in written:
        good, bad = answers[row["chosen_uid"]], answers[row["rejected_uid"]]
        assert good["prompt_uid"] == bad["prompt_uid"] == row["uid"] and good["text"] != bad["text"]
        assert good["rank"] < bad["rank"] if pairs == "rank" else (good["side"], bad["side"]) == ("align", "conflict")
    # prompts with answers of unlike order and text are the ones that are written
    unlike = Counter()
    for uid, group in compared.completions.filter(origin="policy").group_by("prompt_uid"):
        best = group.filter(rank=group["rank"].min()) if pairs == "rank" else group.filter(side="align")
        worse = group.join(best, on="uid", how="anti")
        unlike[uid[0]] = len({(a, b) for a in best["text"] for b in worse["text"] if a != b})
    assert Counter(r["uid"] for r in written) == {uid: n for uid, n in unlike.items() if n}


def test_another_reward_moves_buckets_and_no_row(small, compared):
    found = diff(small, compared)
    assert found.count("in") == found.count("out") == 0  # no rewrite of `small` is kept, so both hold the same rows
    both = set(small.completions["uid"]) & set(compared.completions["uid"])
    assert found.moves["completions"].sum() == len(both) > 0
    counts = Counter()
    for _, bucket, n in found.moves.iter_rows():
        counts[bucket] += n
    assert counts == Counter(compared.completions.filter(compared.completions["uid"].is_in(list(both)))["bucket"])
    assert set(counts) <= {*BUCKETS, None}
    keys = set(found.settings["key"])
    assert {"rollouts.reward.kind", "candidates.similarity"} <= keys and "rollouts.k" not in keys


def test_a_threshold_moves_rewrites(rewritten, tmp_path):
    loose = read(rewritten["out"])
    strict = refilter(loose.folder, 0.9, tmp_path / "strict")
    score = dict(loose.augmentations.select("uid", "score").iter_rows())
    gone = [uid for uid in loose.samples.filter(origin="augmented")["uid"] if score[uid] <= 0.9]
    found = diff(loose, strict)
    assert gone and sorted(found.rows["uid"]) == sorted(gone) and set(found.rows["move"]) == {"out"}
    assert set(found.rows["why"]) == {"setting"}
    assert set(found.rows["detail"]) == {"augment.theta: 0.1000 → 0.9000"}
    assert ("setting", "augment.theta", "0.1", "0.9") in found.settings.rows()
    assert diff(strict, loose).count("in") == len(gone)


def test_a_notebook_sees_the_buckets(small):
    text = unescape(small._repr_html_())
    for name in BUCKETS:
        assert f">{name.replace('_', ' ')}</th>" in text
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", text)][1:]
    assert [int(sum(map(int, row[-5:]))) for row in cells] == small.tasks.sort("stage")["rollouts"].to_list()


def test_a_part_of_a_manifest_is_shown_and_compared(small, tmp_path):
    uids = small.samples.filter(origin="current")["uid"].to_list()
    frames, provenance = part(
        small, uids, small.completions.filter(small.completions["prompt_uid"].is_in(uids)), "some"
    )
    provenance = {**provenance, "buckets": small.provenance["buckets"]}
    write(tmp_path / "part", frames, provenance, card(frames, provenance))
    some = read(tmp_path / "part")
    found = diff(small, some)
    assert (found.kept, found.count("in")) == (len(uids), 0) and found.count("out") == small.samples.height - len(uids)
    assert "Rows of each table" in some._repr_html_()
