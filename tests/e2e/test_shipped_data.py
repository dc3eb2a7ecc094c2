"""The shipped demo data keeps the promises of its card. Nothing outside the repository is read."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from curate.config import BuildConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "superni"
CARD = (ROOT / "data_cards" / "superni.md").read_text(encoding="utf-8")

Row = dict[str, Any]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select_rows = _load(FOLDER / "select_rows.py")
CATEGORIES: tuple[str, ...] = select_rows.CATEGORIES
FEWER = {"program_execution": 29}  # the exception that the card states


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Row]]:
    return {category: list(select_rows.read(FOLDER / f"{category}.jsonl.gz")) for category in CATEGORIES}


@pytest.fixture(scope="module")
def rows(shipped: dict[str, list[Row]]) -> list[Row]:
    return [row for category in CATEGORIES for row in shipped[category]]


def _card_table(heading: str) -> list[dict[str, str]]:
    """The Markdown table under a heading of the card, one mapping a line."""
    section = CARD.split(f"\n### {heading}\n", 1)[1].split("\n### ", 1)[0]
    heads, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def test_the_folder_holds_the_sixteen_files() -> None:
    assert {path.name for path in FOLDER.glob("*.gz")} == {f"{category}.jsonl.gz" for category in CATEGORIES}
    assert len(CATEGORIES) == 16
    assert sum(path.stat().st_size for path in FOLDER.glob("*.gz")) < 700_000


@pytest.mark.parametrize("category", CATEGORIES)
def test_gzip_has_neither_time_nor_file_name(category: str) -> None:
    header = (FOLDER / f"{category}.jsonl.gz").read_bytes()[:8]
    assert header[:2] == b"\x1f\x8b"
    assert header[3] == 0  # FLG: no FNAME
    assert header[4:8] == bytes(4)  # MTIME


@pytest.mark.parametrize("category", CATEGORIES)
def test_size_and_splits_of_a_category(shipped: dict[str, list[Row]], category: str) -> None:
    here = shipped[category]
    if category in FEWER:
        assert len(here) == FEWER[category]
        assert f"**{category} has {len(here)} rows" in CARD
    else:
        assert 60 <= len(here) <= 100
    assert {row["category"].lower() for row in here} == {category}
    assert {row["split"] for row in here} == {"train", "test"}
    assert 0.75 <= sum(row["split"] == "train" for row in here) / len(here) <= 0.85
    assert len({row["input"] for row in here}) == len(here)


def test_every_licence_is_permissive_and_nothing_offends(rows: list[Row]) -> None:
    refused = [(row["id"], select_rows.drop_reason(row)) for row in rows if select_rows.drop_reason(row)]
    assert refused == []
    stated = {licence for row in rows for licence in row["instance_license"]}
    assert stated and not [name for name in stated if re.search(r"SA|NC|ND|GPL|Unknown|http(?!s://librivox)", name)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instance_license": ["CC BY-SA 4.0"]}, "licence"),
        ({"instance_license": ["MIT", "Unknown"]}, "licence"),
        ({"instance_license": []}, "licence"),
        ({"superni_category": "Stereotype Detection"}, "offensive task"),
        ({"task": "task904_hate_speech_offensive_classification"}, "offensive task"),
        ({"definition": "Say whether the post is toxic."}, "offensive task"),
        ({"task": "task1290_xsum_summarization"}, "excluded task"),
        ({"input": "x" * 701}, "long"),
        ({"outputs": ["fine", "x" * 701]}, "long"),
        ({"input": "He was MURDERED."}, "content"),
        ({"input": "O, damnit!"}, "content"),  # by hash
        ({"outputs": ["fine", "mail jo.do@example.org"]}, "content"),
        ({"input": "call (415) 555-0100"}, "content"),
        ({"input": "call 4155550100"}, "content"),
        ({"input": "see www.example.org"}, "content"),
        ({"input": "thanks @some_body"}, "content"),
    ],
)
def test_the_filter_refuses(rows: list[Row], change: Row, reason: str) -> None:
    assert select_rows.drop_reason({**rows[0], **change}) == reason


@pytest.mark.parametrize("text", ["Sussex", "a skilled worker", "whatever I do", "3 @ 5 rs", "1 2 3 4 5 6 7 8 9 10 11"])
def test_the_filter_knows_word_boundaries(rows: list[Row], text: str) -> None:
    assert select_rows.drop_reason({**rows[0], "definition": text, "input": text}) is None


def test_rows_have_their_fields_and_unique_ids(rows: list[Row]) -> None:
    assert all(tuple(row) == select_rows.FIELDS for row in rows)
    assert all(row["definition"].strip() and row["input"].strip() and row["outputs"][0].strip() for row in rows)
    assert [name for name, count in Counter(row["id"] for row in rows).items() if count > 1] == []


@pytest.mark.parametrize(
    ("heading", "column", "key"),
    [
        ("By category", "category", lambda row: row["category"]),
        ("By licence", "licence", lambda row: ", ".join(row["instance_license"])),
        ("By source: attributions", "source", lambda row: ", ".join(row["source"])),
        ("By task", "task", lambda row: row["task"]),
    ],
)
def test_counts_of_the_card(rows: list[Row], heading: str, column: str, key: Callable[[Row], str]) -> None:
    card = {line[column]: tuple(int(line[k]) for k in ("rows", "train", "test")) for line in _card_table(heading)}
    total, splits = Counter(map(key, rows)), Counter((key(row), row["split"]) for row in rows)
    assert card == {name: (n, splits[name, "train"], splits[name, "test"]) for name, n in total.items()}


def test_definitions_and_attributions_of_the_card(shipped: dict[str, list[Row]], rows: list[Row]) -> None:
    for line in _card_table("By category"):
        here = shipped[line["category"].lower()]
        assert int(line["definitions"]) == len({row["definition"] for row in here})
        assert int(line["tasks"]) == len({row["task"] for row in here})
    stated = {
        line["source"]: (line["licence, as SuperNI states it"], line["address"])
        for line in _card_table("By source: attributions")
    }
    for row in rows:
        licence, address = stated[", ".join(row["source"])]
        assert ", ".join(row["instance_license"]) in licence
        assert address.startswith("http")


def test_totals_in_the_card(rows: list[Row]) -> None:
    train = sum(row["split"] == "train" for row in rows)
    tasks = len({row["task"] for row in rows})
    assert f"{len(rows):,} English rows ({train:,} train, {len(rows) - train} test) of {tasks} " in CARD


@pytest.mark.parametrize("name", ["config.yaml", "reverse.yaml", "random.yaml"])
def test_configs_load_and_name_the_sixteen_files(name: str) -> None:
    config = BuildConfig.load(FOLDER / name)
    order = [task.name for task in config.tasks]
    assert sorted(order) == sorted(CATEGORIES)
    assert all(task.path == f"{task.name}.jsonl.gz" and config.resolve(task.path).is_file() for task in config.tasks)
    assert {(task.format, task.split) for task in config.tasks} == {("superni", "train")}
    assert (config.seed, config.replay.selector, config.replay.budget) == (0, "inscl", 200)
    expected = {"config.yaml": list(CATEGORIES), "reverse.yaml": list(CATEGORIES)[::-1]}
    assert order == expected.get(name, order)
    if name == "random.yaml":
        assert order not in expected.values()


def _write(path: Path, rows: list[Row]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_script_is_deterministic_and_idempotent(tmp_path: Path, shipped: dict[str, list[Row]]) -> None:
    """From the shipped rows themselves, in another order, the script selects the same rows again."""
    for category, here in shipped.items():
        _write(tmp_path / f"{category}.jsonl.gz", [] if category in FEWER else here[::-1])
    base = [{k: row[k] for k in ("task", "category", "definition", "input", "outputs", "instance_license")}
            for row in shipped["program_execution"][::-1]]  # fmt: skip
    _write(tmp_path / "superni_base_permissive.jsonl.gz", base)
    first = shipped["program_execution"][0]
    about = {"name": first["task"], "superni_categories": [first["superni_category"]], "url": ["http://example.org"]}
    _write(tmp_path / "superni_full_instructions.jsonl.gz", [{**about, **{k: first[k] for k in ("source", "domains")}}])
    select_rows.main(tmp_path, tmp_path / "out")
    for category in CATEGORIES:
        assert list(select_rows.read(tmp_path / "out" / f"{category}.jsonl.gz")) == shipped[category]


# --- the ranked answers, the changed facts, the starter model ---

EXAMPLES = ROOT / "examples"
CARDS = {
    name: (ROOT / "data_cards" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("qa_feedback", "templama", "starter")
}
ranked = _load(EXAMPLES / "ranked" / "select_rows.py")
conflict = _load(EXAMPLES / "conflict" / "select_rows.py")
RANKED, CONFLICT = EXAMPLES / "ranked" / "qa_feedback.jsonl.gz", EXAMPLES / "conflict" / "templama.jsonl.gz"
STARTER = EXAMPLES / "starter"


@pytest.fixture(scope="module")
def answers() -> list[Row]:
    return list(ranked.read(RANKED))


@pytest.fixture(scope="module")
def facts() -> list[Row]:
    return list(conflict.read(CONFLICT))


def _table(card: str, heading: str) -> list[dict[str, str]]:
    """The Markdown table of a card whose first columns have these headings, one mapping a line."""
    start = card.index(f"\n| {heading} |") + 1
    heads, _, *lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in card[start:].split("\n\n")[0].splitlines()
    ]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _splits(rows: list[Row], key: Callable[[Row], Any]) -> dict[str, set[Any]]:
    return {split: {key(row) for row in rows if row["split"] == split} for split in ("train", "test")}


@pytest.mark.parametrize(("path", "card"), [(RANKED, "qa_feedback"), (CONFLICT, "templama")])
def test_a_new_set_is_the_file_that_its_card_names(path: Path, card: str) -> None:
    assert f"File: `{path.relative_to(ROOT)}`" in CARDS[card]
    assert f"`{_sha256(path)}`" in CARDS[card]
    header = path.read_bytes()[:8]
    assert (header[3], header[4:8]) == (0, bytes(4))  # neither file name nor time
    assert path.stat().st_size < 50_000


def test_ranked_counts_fields_and_licence(answers: list[Row]) -> None:
    assert all(tuple(row) == ranked.FIELDS for row in answers)
    assert Counter(row["split"] for row in answers) == {"train": 48, "test": 12}
    assert {(row["task"], row["license"]) for row in answers} == {("long_form_qa", "Apache-2.0")}
    assert len({row["id"] for row in answers}) == len({row["question"] for row in answers}) == 60
    assert all(row["question"].strip() and row["gold"].strip() for row in answers)
    assert "60 English questions (48 train, 12 test)" in CARDS["qa_feedback"]


def test_ranked_candidates_are_well_formed(answers: list[Row]) -> None:
    for row in answers:
        candidates = row["candidates"]
        assert [tuple(candidate) for candidate in candidates] == [("text", "score", "rank")] * 4
        assert all(0 < len(candidate["text"].strip()) <= ranked.MAX_CHARS for candidate in candidates)
        assert len({candidate["text"] for candidate in candidates}) == 4
        scores = [candidate["score"] for candidate in candidates]
        assert sum(scores) == 0  # every win is another's loss
        levels = sorted(set(scores), reverse=True)
        assert [candidate["rank"] for candidate in candidates] == [1 + levels.index(score) for score in scores]


def test_ranked_ties_are_those_of_the_card(answers: list[Row]) -> None:
    def pattern(row: Row) -> str:
        return " ".join(map(str, sorted(candidate["rank"] for candidate in row["candidates"])))

    total, splits = Counter(map(pattern, answers)), Counter((pattern(row), row["split"]) for row in answers)
    assert {line["ranks, sorted"]: tuple(int(line[k]) for k in ("rows", "train", "test"))
            for line in _table(CARDS["qa_feedback"], "ranks, sorted")} == {
        name: (count, splits[name, "train"], splits[name, "test"]) for name, count in total.items()
    }  # fmt: skip
    tied = Counter(row["split"] for row in answers if pattern(row) != "1 2 3 4")
    assert (
        f"{tied.total()} of 60 rows have a tie ({tied['train']} of 48 train, {tied['test']} of 12 test)"
        in CARDS["qa_feedback"]
    )
    assert tied["train"] and tied["test"]


def test_ranked_rows_and_attributions_of_the_card(answers: list[Row]) -> None:
    lines = _table(CARDS["qa_feedback"], "number")
    assert [(f"qa_feedback/dev/{line['number']}", line["split"], line["ranks"]) for line in lines] == [
        (row["id"], row["split"], " ".join(str(candidate["rank"]) for candidate in row["candidates"]))
        for row in answers
    ]
    pages = [{"split": line["split"], "page": page} for line in lines for page in line["Wikipedia pages"].split("; ")]
    by_split = _splits(pages, lambda page: page["page"])
    assert by_split["train"] & by_split["test"] == set()


def _feedback(**change: Any) -> Row:
    """An entry of dev_feedback.json: 1 beats all, 2 and 3 tie, 4 loses to all."""
    return {
        "question": "Who?", "gold": "It was Ann. ", "passages": [["Title", "First one.", "Second one."]],
        "prediction 1": "Ann", "prediction 2": "Bea", "prediction 3": "Cid ", "prediction 4": "Dan",
        "preference": [1, 1, 1, 0, 1, 1], **change,
    }  # fmt: skip


def test_ranked_converts_comparisons_to_scores_and_ranks() -> None:
    row = ranked.convert(7, _feedback())
    assert row["id"] == "qa_feedback/dev/7"
    assert row["candidates"] == [
        {"text": "Ann", "score": 3, "rank": 1},  # three wins
        {"text": "Bea", "score": 0, "rank": 2},  # a loss, a tie, a win
        {"text": "Cid", "score": 0, "rank": 2},
        {"text": "Dan", "score": -3, "rank": 3},
    ]
    assert (row["gold"], row["consistent"]) == ("It was Ann.", True)
    assert row["passages"] == [{"title": "Title", "text": "First one. Second one."}]
    assert not ranked.convert(0, _feedback(preference=[1, 1, 1, 0, 1, 0]))["consistent"]  # 2 and 3 tie, 0 and -1
    assert not ranked.convert(0, _feedback(preference=[1, 2, 1, 1, 1, 1]))["consistent"]  # a circle: 1 > 2 > 3 > 1


def test_ranked_counts_copied_words() -> None:
    assert ranked.copied_words("It rose: the SUN, early.", ["He saw that the sun early was red."]) == 3
    assert ranked.copied_words("a b c a b", ["x a b", "b c a b y"]) == 4
    assert ranked.copied_words("sunny", ["sun"]) == ranked.copied_words("one", []) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"preference": [1, 2, 1, 1, 1, 1]}, "inconsistent"),
        ({"prediction 2": "x" * 400}, None),
        ({"prediction 2": "x" * 401}, "long"),
        ({"prediction 2": "Ann"}, "equal answers"),
        ({"prediction 2": "so " * 30, "passages": [["T", "so " * 99]]}, None),
        ({"prediction 2": "so " * 31, "passages": [["T", "so " * 99]]}, "copied"),
        ({"gold": "so " * 31, "passages": [["T", "so " * 99]]}, "copied"),
    ],
)
def test_ranked_filter(change: Row, reason: str | None) -> None:
    assert ranked.drop_reason(ranked.convert(7, _feedback(**change))) == reason


def test_ranked_script_is_deterministic_and_reads_both_forms(tmp_path: Path, answers: list[Row]) -> None:
    """From the shipped rows in another order the script selects the same rows again, and twice the same bytes."""
    _write(tmp_path / "source.jsonl.gz", [{**row, "passages": [], "consistent": True} for row in answers[::-1]])
    for name in ("once.gz", "twice.gz"):
        ranked.main(tmp_path / "source.jsonl.gz", tmp_path / name)
    assert list(ranked.read(tmp_path / "once.gz")) == answers
    assert (tmp_path / "once.gz").read_bytes() == (tmp_path / "twice.gz").read_bytes()
    (tmp_path / "original.json").write_text(json.dumps([_feedback(), _feedback(question="Where?")]), encoding="utf-8")
    assert len(ranked.choose(ranked.read(tmp_path / "original.json"))) == 2


def test_conflict_counts_fields_and_licence(facts: list[Row]) -> None:
    assert all(tuple(row) == conflict.FIELDS for row in facts)
    assert Counter(row["split"] for row in facts) == {"train": 60, "test": 20}
    assert {row["license"] for row in facts} == {conflict.LICENSE}
    assert f"`{conflict.LICENSE}`" in CARDS["templama"]
    assert all(str(row[field]).strip() for row in facts for field in conflict.FIELDS)
    assert "80 English questions (60 train, 20 test)" in CARDS["templama"]


def test_conflict_relations_are_those_of_the_card(facts: list[Row]) -> None:
    total = Counter((row["relation"], row["domain"]) for row in facts)
    splits = Counter((row["relation"], row["split"]) for row in facts)
    assert {(line["relation"], line["domain"]): tuple(int(line[k]) for k in ("rows", "train", "test"))
            for line in _table(CARDS["templama"], "relation | domain")} == {
        name: (count, splits[name[0], "train"], splits[name[0], "test"]) for name, count in total.items()
    }  # fmt: skip
    assert max(total.values()) - min(total.values()) <= 1  # balanced


def test_conflict_questions_are_unique_and_no_person_is_in_both_splits(facts: list[Row]) -> None:
    assert len({row["question"] for row in facts}) == len({row["id"] for row in facts}) == len(facts)
    people = _splits(facts, lambda row: row["id"].removeprefix("templama/").split("_")[0])
    assert people["train"] & people["test"] == set()


def test_conflict_answers_changed(facts: list[Row]) -> None:
    assert all(conflict.drop_reason(row) is None and row["old_date"] < row["new_date"] for row in facts)
    assert all(row["id"].endswith(f"_{row['relation']}_{row['old_date']}-{row['new_date']}") for row in facts)
    assert max(Counter(row["new_answer"] for row in facts).values()) <= conflict.MAX_SAME_ANSWER
    latest = Counter(row["new_date"] for row in facts)["2020"]
    assert f"{latest} of the 80 new answers" in CARDS["templama"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Chelsea F.C.", "Real Madrid CF", None),
        ("mayor", "United States senator", "common noun"),
        ("President of Italy", "senatore a vita", "common noun"),
        ("Chief Justice", "Chief justice of India", "same"),
        ("1. FC Köln", "Élan Béarnais", None),
    ],
)
def test_conflict_filter(old: str, new: str, reason: str | None) -> None:
    assert conflict.drop_reason({"old_answer": old, "new_answer": new}) == reason


def _record(year: str, *names: str) -> Row:
    return {
        "query": "Ann Bo works for _X_.", "relation": "P108", "date": year, "id": f"Q1_P108_{year}",
        "answer": [{"name": name} for name in names],
    }  # fmt: skip


def test_conflict_converts_neighbouring_records() -> None:
    records = [_record("2010", "Aa"), _record("2012", "Bb", "Cc"), _record("2013", "Cc"), _record("2020", "Dd")]
    first, last = conflict.convert(records)  # 2012 to 2013 is no change: Cc is an answer of both
    assert first == {
        "id": "templama/Q1_P108_2010-2012", "domain": "people", "relation": "P108", "subject": "Ann Bo",
        "question": "Who does Ann Bo work for?", "old_answer": "Aa", "new_answer": "Bb",
        "old_date": "2010", "new_date": "2012",
    }  # fmt: skip
    assert (last["old_answer"], last["new_answer"]) == ("Cc", "Dd")
    assert [row["new_answer"] for row in conflict.choose([first, last])] == ["Dd"]  # a subject's last change alone


def test_conflict_script_is_deterministic(tmp_path: Path, facts: list[Row]) -> None:
    """From the shipped rows in another order the script selects the same rows again, and twice the same bytes."""
    _write(tmp_path / "source.jsonl.gz", [{**row, "subject": row["question"]} for row in facts[::-1]])
    for name in ("once.gz", "twice.gz"):
        conflict.write(tmp_path / name, conflict.choose(conflict.read(tmp_path / "source.jsonl.gz")))
    assert list(conflict.read(tmp_path / "once.gz")) == facts
    assert (tmp_path / "once.gz").read_bytes() == (tmp_path / "twice.gz").read_bytes()


def test_the_starter_is_what_its_card_states() -> None:
    made_by = {"prepare.py", "data.yaml", "held_out.yaml", "recipe.yaml"}
    assert made_by <= {path.name for path in STARTER.iterdir()}
    files = sorted(path for path in STARTER.iterdir() if path.is_file() and path.name not in made_by)
    assert [(line["file"], line["bytes"], line["sha256"]) for line in _table(CARDS["starter"], "file")] == [
        (path.name, f"{path.stat().st_size:,}", _sha256(path)) for path in files
    ]
    size = sum(path.stat().st_size for path in files)
    assert size <= 16_000_000
    assert f"{len(files)} files, {size:,} bytes in all" in CARDS["starter"]


def test_the_starter_has_the_parameters_of_its_card() -> None:
    with safe_open(str(STARTER / "model.safetensors"), framework="np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == 6144 * 256 + 6 * (4 * 256**2 + 3 * 256 * 768 + 2 * 256) + 256
    assert f"language model of {count:,} parameters" in CARDS["starter"]
    assert f"{len(shapes)} tensors" in CARDS["starter"]


def test_the_starter_speaks_its_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (6144, 1, 0)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_starters_answers_are_of_the_first_test_rows(shipped: dict[str, list[Row]]) -> None:
    first = [next(row for row in shipped[name] if row["split"] == "test") for name in sorted(CATEGORIES)]
    assert [(line["row"], line["accepted answer (the first)"]) for line in _table(CARDS["starter"], "row")] == [
        (row["id"], row["outputs"][0].strip()) for row in first
    ]
    scores = {line["category"]: line for line in _table(CARDS["starter"], "category")}
    assert {name.lower() for name in scores} == {*CATEGORIES, "all"}
    tokens = int(scores["all"]["answer tokens"].replace(",", ""))
    assert f"**{scores['all']['nats an answer token']} nats an answer token** ({tokens:,} tokens)" in CARDS["starter"]
    assert sum(int(line["answer tokens"].replace(",", "")) for line in scores.values()) == 2 * tokens


def test_the_demo_config_names_every_stage_and_shipped_files() -> None:
    config = BuildConfig.load(EXAMPLES / "demo" / "config.yaml")
    assert [task.name for task in config.tasks] == [*CATEGORIES, "long_form_qa", "changed_facts"]
    assert all(config.resolve(task.path).is_file() and task.split == "train" for task in config.tasks)
    assert config.policy is not None and config.resolve(config.policy.model).resolve() == STARTER
    assert config.rollouts is not None and config.augment is not None and config.candidates.similarity
    assert config.tasks[-2].ranked_by == "human"
