"""Make the shipped demo files from a folder with the sixteen category files of the SuperNI subset.

    python examples/superni/select_rows.py SUPERNI_FOLDER OUT_FOLDER

SUPERNI_FOLDER holds <category>.jsonl.gz (sixteen), superni_base_permissive.jsonl.gz and
superni_full_instructions.jsonl.gz. The same input gives the same rows: nothing is drawn but by a hash of the row's id.
The rule, and what it cannot do, stands in data_cards/superni.md. (Not named select.py: that would hide the standard
library's `select` from every `python -m` started in this folder.)
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SEED = 0
TRAIN_ROWS, TEST_ROWS = 77, 19  # a category: 96 rows, 80 % train as in the source
MAX_CHARS = 700  # of the input, and of each output

CATEGORIES = (  # InsCL's curriculum order
    "classification", "text_quality_evaluation", "code", "detection", "sentiment_analysis", "comprehension",
    "closed_qa", "extraction", "dialogue", "program_execution", "rewriting", "open_qa", "misc", "generation",
    "summarization", "mathematics",
)  # fmt: skip
FILLED = ("program_execution",)  # no permissive row in its own file: filled from superni_base_permissive.jsonl.gz

FIELDS = (
    "id", "task", "category", "superni_category", "source", "definition", "domains", "instance_license", "split",
    "input", "outputs",
)  # fmt: skip

PERMISSIVE = frozenset({
    "AFL 3.0",
    "Apache 2.0",
    "BSD",
    "BSD 2-Clause",
    "CC BY",
    "CC BY 3.0",
    "CC BY 4.0",
    "CC0",
    "CC0 1.0 Universal",
    "CC0: Public Domain",
    "CDLA Permissive 2.0",
    "LibriVox: Public Domain (https://librivox.org/pages/public-domain/)",
    "MIT",
    "Public Domain",
})  # fmt: skip

# Tasks about offensive content, by superni_category or by a word of the task's name or definition.
OFFENSIVE_CATEGORIES = frozenset({"Toxic Language Detection", "Stereotype Detection"})
OFFENSIVE_TASK = re.compile(
    r"(?<![a-z])(?:hate|toxic|offens|abus|stereotyp|civil_comments|jigsaw|sbic|obscen|profan|porn|sexual|insult|threat)",
    re.IGNORECASE,
)

# Tasks left out after reading them, or because the stated licence cannot cover the text.
EXCLUDED_TASKS = {
    "task288_gigaword_summarization": "news-agency text sold by the LDC; the stated MIT is a repository's",
    "task1579_gigaword_incorrect_summarization": "news-agency text sold by the LDC; the stated MIT is a repository's",
    "task1290_xsum_summarization": "BBC articles; the authors own no copyright (github EdinburghNLP/XSum, issue 13)",
    "task927_yelp_negative_to_positive_style_transfer": "Yelp reviews; the stated MIT is a repository's",
    "task928_yelp_positive_to_negative_style_transfer": "Yelp reviews; the stated MIT is a repository's",
    "task106_scruples_ethical_judgment": "Reddit lines on private lives, some sexual or demeaning in plain words",
    "task224_scruples_anecdotes_ethical_judgment": "whole Reddit posts on private lives",
    "task508_scruples_dilemmas_more_ethical_isidentifiable": "as task106",
    "task511_reddit_tifu_long_text_summarization": "whole Reddit posts on private lives; stated MIT is a repository's",
    "task281_points_of_correspondence": "CNN articles, many on victims who are named; the stated BSD is a repository's",
    "task1669_md_gender_bias_text_modification": "gender stereotypes, and answers that do not follow the instruction",
}
EXCLUDED_IDS = {
    "task066-1a451458c0e848658cfa4ab39f8ff678": "sexual",
    "task1703-bfba8a4f9e624ab3b7b5a95e952160a4": "violent",
    "task1706-a6e8890bf4de41c49e46d49bca516dd3": "a named child's school test",
    "task330-f1556bab318f4da69861cc61f57ff55d": "violent",
    "task429-8fe64da5f6a74cbbaf3408d25099f079": "suicidal",
    "task429-ad1c686a27a64bc59c79a3673eb52b6b": "sexual",
    "task476-ab26124e593d485c95fa7099f4d9f0aa": "about race",
    "task493-f7c53f1fd8c540538a51793855bc6885": "demeans a singer",
    "task516-fe469e406b7f412c9561a783bf4a109b": "sexual",
    "task547-e10414600a3d4931bb0a18fb7c9895aa": "violent",
    "task589-63f3714d63b8482ab81ae13e92ea0080": "signed with a full name",
    "task589-c1d8755f772e4f50b952ab9a47423f21": "a full name",
    "task590-5a80002b767846a7a202b848fa7bacba": "signed with a full name",
    "task766-00cfa4c2bb7e4f29a34e5aff15fa5cd9": "violent",
    "task889-407f65d6f5664d9e8a2a8a709e743f52": "suicidal",
}

# Sexual and violent vocabulary, whole words in lower case.
WORDS = frozenset(
    """
    abuse abused abusing abusive anal assault assaulted behead beheaded bloodbath blowjob boob boobs brothel cannibal
    cannibals cocaine condom condoms dildo dildos disfigured erection erotic fetish gallows genital genitals genocide
    hanged heroin holocaust horny incest intercourse kill killed killer killers killing killings kills lynch lynched
    massacre massacred masturbate masturbated masturbating masturbation meth moan moaned moaning moans molest molested
    murder murdered murderer murderers murders mutilated naked nazi nazis nude nudes nudity orgasm orgy pedophile
    penis porn porno pornographic pornography prostitute prostitutes prostitution rape raped raping rapist sex sexes
    sexier sexist sexual sexuality sexually sexy slaughter slaughtered sperm stab stabbed stabbing strangle strangled
    stripper strippers suicidal suicide suicides terrorist terrorists topless torture tortured vagina viagra
    """.split()
)
# Slurs and swear words: the first 16 hexadecimal digits of the SHA-256 of the lower-cased word.
HASHED_WORDS = frozenset(
    """
    0340a569873ddf08 038c9ccdd226f572 044eb98b18769b88 05b71b9303ad6c74 06a1d8bf7fc210de 08a841e996781e9e
    0c64f3ba82e066a2 0ce875d620076b53 0dcc4d3364433181 0f28c4960d96647e 0fcb77e9e0077de5 110c6c5a86fa0de5
    11cf8376a1575fdc 120f6e5b4ea32f65 12e6274e4309293e 13a465fc6616da8d 158869a97379229b 16ea09fc78ca83ca
    17a110e533284872 17bde8b4064612e2 1802d081455e60cd 1837bc2c546d46c7 1b83044895756d26 1ce99fbe332c5003
    1e02eec4f1095143 2062f80093066633 2189c0ed714f0c54 22fc75e65a0e9d34 245c20d383aea7a8 262f86db0ac788ad
    26578569a290ecbe 267463e5e36cd787 268651b3ece98010 27eb0c4ad7072067 2b3240970c71346b 2d2332f38d6c0213
    2da888fb5e7c5a6f 2f5f6ce5ae30b54a 30a989afc82c0a21 31506a8448a761a4 32c2aaad55e448da 3314b0999a53aafe
    333f7618092958c7 33740da8a87dc7de 341d56384afc0f47 380c97e6c5588cdd 3ae80d6f98a96fd3 3b1e0d7c5dd45583
    3ff9947148032e99 402f7ebd98864afe 41b4d5e85655f1b3 4404f5b7a8836863 453aa9ef6da248b3 45cd3e1bb472d8e2
    45fb7c3b72b6856c 4b18aefe826adf55 4c58f5d5fe92c3ed 517ae3f73216da64 522788b65f01ccc0 52c1d7686727b74e
    566f532d486c9477 594810adcbee20bd 5a9d9dcefb56e593 5b3ae48be122f7ed 5cb6ba4a9d88885c 6122fdf4ae1474fb
    613ddd9aff46e2a0 619bc82e0d200e4a 63333e4b5d1cde54 640e1deee53e689f 64e2c78275b1e09f 65961619eae0bfcd
    6ac3c336e4094835 6d1833779e389477 6dbe0f85a074203f 701033ae26411908 70a4ce3720ccf427 70aafb4266950c0d
    7122c9a14ba2d20e 7595d27f5a2390b1 796e43a5a8cdb73b 7bc671151cbfaee7 7c4a5c242b72a23d 80d71140f751394c
    819837a1df89760e 82159dd02870c13e 822dbbb9bf70ba35 83621b34ec5955e5 83bd72f7a1be797a 85266837dfc78c80
    8544771bd2f498e6 85fc17f7069acd39 886d51e97ad7931d 89133bc00e9b3eb8 89702d91e0e513e9 8f5083e3e5c7dc89
    92a9bf818e7e0002 937d56e49744d206 94a877e2ce63725e 958ce5c321d25499 96c91fa847821d6e 986c99004163a6c5
    98980840dd2f3d5b 98b52c4b6b7d1f48 9915ba2d822280f2 99e367bcad7a502f 9ae315a94e428a7e a24efab8d957af0a
    a360455901adad12 a40ccba874d28799 a4b5160decccbc1e a7bf072c97a0779f a84301e8f6107e15 acd9193a33ddc5c6
    ad505b0be8a49b89 ad6cacf3af98d07b affc875700667e07 b04a8a4006358447 b601d5e9e6c9804e b690cdbe59f14b3b
    b81d6dc25832a854 bb209d506bb8b178 bb61ef40814ce34c bb87adf8aa783887 bbf8bb7863176009 bd331fb1d24298f5
    bdb1cc258d6976aa be00f1af522eaa99 c1cabb6f6e431f9c c22f315f1b330bfd c2c3b68b48832afd c3de533e9b7fe63b
    cbbd0f71af28b3bf cc02032349c833ac ccff74c2d57f45d2 d6be0c9fb07891cf d75a838dc758ba17 d95b1fc7856571b0
    da0a6b1b9213d48f daec0c235d3135fc db10a7906121f4ea dc2abe4ed2d8a549 dc52ab1c9ebf4574 dc675e448132fd2a
    dcb85fcf872ebfc6 dcd2ee35085fdfb0 dd92623b0a4b255f df736257aa81e4a7 e273db21d19ee957 e512a05583448f44
    e7b98c6aa5b944e0 e84dde508a606a3e e9143a29033d9145 e9e8b6c5afa7794f ed6bf432aec21f9a eda887476f1dffc9
    eef3bd091670c344 f1a5fb56076acc84 f50c51ed2315dcf3 f59e28f8bb6499dd f9d0d9b18ae9033a fa38a8d3e5b92744
    fb96c27642b4bd11
    """.split()
)
TOKEN = re.compile(r"[a-z0-9]+(?:['*$@!][a-z0-9]+)*")

PERSONAL = re.compile(
    r"[\w.+-]+@[\w-]+\.\w+"  # an e-mail address
    r"|(?:\+?\d{1,2}[ .-]?)?\(?\b\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b"  # a North American telephone number
    r"|\b\d{10}\b"  # the same without separators
    r"|\+\d{1,3}[ .-]?\d[\d .-]{6,}\d"  # an international one
    r"|https?://|\bwww\.|(?<!\w)(?:/?u/|@)\w{3,}"  # a link, a handle
)


def is_permissive(row: Row) -> bool:
    """Every licence that SuperNI states for the row's task is on the list; none stated is not permissive."""
    return bool(row["instance_license"]) and PERMISSIVE.issuperset(row["instance_license"])


def is_offensive_task(row: Row) -> bool:
    """The task is about offensive content, by its category, name or definition."""
    return row["superni_category"] in OFFENSIVE_CATEGORIES or bool(
        OFFENSIVE_TASK.search(row["task"]) or OFFENSIVE_TASK.search(row["definition"])
    )


def blocked(text: str) -> str | None:
    """The first word or personal datum for which a text is refused, or None.

    >>> blocked("It was a violent MURDER.")
    'murder'
    >>> blocked("write to a.b@example.org")
    'a.b@example.org'
    >>> blocked("Sussex is a county") is None
    True
    """
    for word in TOKEN.findall(text.lower()):
        if word in WORDS or _hash(word)[:16] in HASHED_WORDS:
            return word
    found = PERSONAL.search(text)
    return found.group() if found else None


def row_text(row: Row) -> str:
    """All the text that a model would see of a row."""
    return "\n".join([row["definition"], row["input"], *row["outputs"]])


def drop_reason(row: Row) -> str | None:
    """Why a row is not shipped, or None."""
    if not is_permissive(row):
        return "licence"
    if is_offensive_task(row):
        return "offensive task"
    if row["task"] in EXCLUDED_TASKS:
        return "excluded task"
    if row["id"] in EXCLUDED_IDS:
        return "excluded row"
    if max(map(len, [row["input"], *row["outputs"]])) > MAX_CHARS:
        return "long"
    return "content" if blocked(row_text(row)) else None


def spread(rows: Iterable[Row], quota: int) -> list[Row]:
    """Up to `quota` rows, round robin over definitions; within one in the order of a seeded hash of the id."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _hash(f"{SEED} {row['id']}")):
        groups[row["definition"]].append(row)
    rounds = itertools.zip_longest(*(groups[definition] for definition in sorted(groups)))
    return list(itertools.islice((row for turn in rounds for row in turn if row is not None), quota))


def choose(rows: Iterable[Row]) -> list[Row]:
    """The shipped rows of one category, by task and id; no input occurs twice, so none is both train and test."""
    kept: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: _hash(f"{SEED} {row['id']}")):
        if drop_reason(row) is None:
            kept.setdefault(row["input"], row)
    chosen = [
        row
        for split, quota in (("train", TRAIN_ROWS), ("test", TEST_ROWS))
        for row in spread((row for row in kept.values() if row["split"] == split), quota)
    ]
    return sorted(chosen, key=lambda row: (row["task"], row["id"]))


def read(path: Path) -> Iterator[Row]:
    """Rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def fill(folder: Path, category: str) -> list[Row]:
    """Rows of a category from the base file, which has neither id nor split: both come from a hash of the content."""
    about = {task["name"]: task for task in read(folder / "superni_full_instructions.jsonl.gz")}
    rows = []
    for row in read(folder / "superni_base_permissive.jsonl.gz"):
        if row["category"].lower() == category:
            task = about[row["task"]]
            digest = _hash(json.dumps([row["task"], row["input"], row["outputs"]], ensure_ascii=False))
            rows.append({
                **row,
                "id": f"{row['task'].split('_')[0]}-{digest[:32]}",
                "superni_category": task["superni_categories"][0],
                "source": task["source"],
                "domains": task["domains"],
            })  # fmt: skip
    rows.sort(key=lambda row: _hash(f"{SEED} {row['id']}"))
    test = round(len(rows) * TEST_ROWS / (TRAIN_ROWS + TEST_ROWS))
    return [{**row, "split": "test" if place < test else "train"} for place, row in enumerate(rows)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Gzipped JSONL without a time stamp or file name, so that the same rows give the same bytes."""
    lines = (json.dumps({field: row[field] for field in FIELDS}, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write("".join(lines).encode())


def table(heads: tuple[str, ...], lines: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    cells = [heads, tuple("---" for _ in heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in cells)


def card_tables(rows: list[Row], addresses: dict[str, str]) -> str:
    """The counts and the attributions of the data card. `addresses`: source name -> where SuperNI says it is from."""
    splits = ("train", "test")

    def count(key: Callable[[Row], object], extra: Callable[[list[Row]], tuple[object, ...]]) -> list[tuple]:
        groups: dict[Any, list[Row]] = defaultdict(list)
        for row in rows:
            groups[key(row)].append(row)
        return [
            (name, len(group), *(sum(row["split"] == split for row in group) for split in splits), *extra(group))
            for name, group in groups.items()
        ]

    def distinct(group: list[Row], field: str) -> int:
        return len({json.dumps(row[field]) for row in group})

    def named(field: str) -> Callable[[Row], str]:
        return lambda row: ", ".join(row[field]) if isinstance(row[field], list) else row[field]

    counts = ("rows", *splits)
    categories = count(named("category"), lambda group: (distinct(group, "task"), distinct(group, "definition")))
    licences = sorted(count(named("instance_license"), lambda group: ()))
    tasks = count(named("task"), lambda group: (named("source")(group[0]), named("instance_license")(group[0])))
    sources = sorted(
        count(named("source"), lambda group: (", ".join(sorted({named("instance_license")(row) for row in group})),))
    )
    return "\n\n".join((
        "### By category", table(("category", *counts, "tasks", "definitions"), categories),
        "### By licence", table(("licence", *counts), licences),
        "### By source: attributions",
        table(("source", *counts, "licence, as SuperNI states it", "address"),
              [(*line, addresses.get(str(line[0]), "")) for line in sources]),
        "### By task", table(("task", *counts, "source", "licence"), tasks),
    ))  # fmt: skip


def main(folder: Path, out: Path) -> None:
    """Write the sixteen files and print the tables of their data card."""
    out.mkdir(parents=True, exist_ok=True)
    shipped: list[Row] = []
    for category in CATEGORIES:
        rows = fill(folder, category) if category in FILLED else read(folder / f"{category}.jsonl.gz")
        chosen = choose(rows)
        write(out / f"{category}.jsonl.gz", chosen)
        shipped += chosen
    known = read(folder / "superni_full_instructions.jsonl.gz")
    addresses = {", ".join(task["source"]): ", ".join(task["url"]) for task in known}
    print(card_tables(shipped, addresses))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python select_rows.py SUPERNI_FOLDER OUT_FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
