"""--prompts: which image gets which text, the public formats, what is recorded, and what is refused before loading."""

import json
from collections import Counter
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import pytest

from tests.generation.test_generate import BAG, BOOT, CLASSES, COAT, call, entries, files_of, tiny  # noqa: F401
from utils.classes import ClassRow, ClassTable, load_classes
from utils.cli import UserError
from utils.dataset.folder import open_dataset
from utils.generation.prompt_files import read_prompts, recorded_template
from utils.generation.prompts import class_prompts, image_seed, parse_template, prompt_warnings, supervision_of
from utils.report.records import Training
from utils.training.image_sets import open_images

TABLE = load_classes(CLASSES)
SHARKS = ClassTable(
    "sharks", (ClassRow("n1", "tiger"), ClassRow("n2", "tiger shark, Galeocerdo"), ClassRow("n3", "ray"))
)


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def one_each(path: Path, text: str) -> Path:
    return written(path, "id\tprompt", *(f"{wnid}\t{text}" for wnid in TABLE.ids))


def texts_of(out: Path) -> list[str]:
    return [entry["prompt"] for wnid in TABLE.ids for entry in entries(out, wnid)]


# ===== which image gets which text =====


def test_one_template_a_class_gives_the_bytes_of_prompt(tmp_path, tiny):  # noqa: F811
    scene = "{name}, {hypernym} inside {background}"
    assert call(tmp_path / "a", tiny, "--prompt", scene) == 0
    assert call(tmp_path / "b", tiny, "--prompts", one_each(tmp_path / "p.tsv", scene), "--chunk", "1/2") == 0
    assert call(tmp_path / "b", tiny, "--prompts", tmp_path / "p.tsv") == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_seed_picks_in_proportion_to_the_weights(tmp_path):
    weights = {"a tench": 1.0, "a fish": 2.5, "tench soup": 4.5}
    lines = [{"id": wnid, "prompt": text, "weight": w} for wnid in TABLE.ids for text, w in weights.items()]
    found = read_prompts(written(tmp_path / "p.jsonl", *lines), TABLE)
    listed = list(class_prompts(TABLE.rows[0], found, range(8000), seed=3))
    for prompt in listed:  # the same in exact arithmetic
        position, below = Fraction(image_seed(3, BAG, prompt.index), 2**63) * 8, Fraction(0)
        for text, weight in weights.items():
            if below <= position < below + Fraction(weight):
                assert prompt.text == text
            below += Fraction(weight)
    counts = Counter(prompt.text for prompt in listed)
    chi_square = sum((counts[text] - 1000 * weight) ** 2 / (1000 * weight) for text, weight in weights.items())
    assert chi_square < 18  # 2 degrees of freedom: p about 1e-4
    assert listed[:10] == list(class_prompts(TABLE.rows[0], found, range(10), seed=3))


def test_the_last_text_gets_the_largest_seed(tmp_path):
    lines = [{"id": wnid, "prompt": text} for wnid in TABLE.ids for text in ("first", "last")]
    found = read_prompts(written(tmp_path / "p.jsonl", *lines), TABLE)
    assert found.pick(BAG, 0).text == "first" and found.pick(BAG, 2**63 - 1).text == "last"


def test_warnings_cover_every_text(tmp_path):
    rows = [f"{wnid}\t{text}" for wnid in TABLE.ids for text in (f"only {wnid}", "shared", "one two three four")]
    found = read_prompts(written(tmp_path / "p.tsv", "id\tprompt", *rows), TABLE)
    warnings = prompt_warnings(TABLE, found, count_tokens=lambda text: len(text.split()), max_tokens=3)
    assert warnings[0] == f"same prompt for 3 classes ({', '.join(TABLE.ids)}): 'shared'"
    assert [line.partition(":")[0] for line in warnings[2:]] == TABLE.ids and "cut off: 'four'" in warnings[2]


# ===== formats =====


def test_tables_and_json_lines_say_the_same(tmp_path):
    lines = [{"id": wnid, "prompt": 'a "b" {{x}} é', "weight": 2} for wnid in TABLE.ids]
    tsv = written(tmp_path / "p.tsv", "weight\tclass\ttext", *(f'2\t{wnid}\ta "b" {{{{x}}}} é' for wnid in TABLE.ids))
    a, b = read_prompts(tsv, TABLE), read_prompts(written(tmp_path / "p.jsonl", *reversed(lines)), TABLE)
    assert a.sha256 == b.sha256 == sha256(a.content).hexdigest()
    assert next(class_prompts(TABLE.rows[0], a, [0])).text == 'a "b" {x} é'
    (tmp_path / "again.jsonl").write_bytes(a.content)
    assert read_prompts(tmp_path / "again.jsonl", TABLE) == a


CAPTIONS = [
    "A tiger sleeps, somewhere.",
    "a Tiger Shark hunts",
    "tiger meets ray",
    "one {odd} ray",
    "nothing",
    "arrays",
]
EXPECTED = [("n1", CAPTIONS[0]), ("n2", CAPTIONS[1]), ("n3", "one {odd} ray")]


@pytest.mark.parametrize("kind", ["synclr", "synthclip", "balanced"])
def test_captions_of_no_class_go_to_the_class_they_name(tmp_path, capsys, kind):
    """Each file as its project's code writes it."""
    path = tmp_path / ("p.txt" if kind == "synclr" else "p.json")
    with open(path, "w") as file:
        if kind == "synclr":  # synthesize_text.py
            file.writelines([p.strip().replace("\n", " ") + "\n" for p in CAPTIONS])
        elif kind == "synthclip":  # captions_generator.py
            json.dump(CAPTIONS, file, indent=2)
        else:  # balancing.py: a caption and the numbers of its concepts
            json.dump([[text, [3, 12]] for text in CAPTIONS], file)
    found = read_prompts(path, SHARKS)
    assert [(row.wnid, next(class_prompts(row, found, [0])).text) for row in SHARKS.rows] == EXPECTED
    assert "3 of 6 captions name one class of sharks" in capsys.readouterr().out


def test_captions_a_class_are_drawn_as_their_paper_draws_them(tmp_path):
    for wnid in TABLE.ids:  # save_list() of its utils.py: no suffix
        (tmp_path / wnid).write_text("a {1} on paper\na chalk line\n")
    found = read_prompts(tmp_path, TABLE)
    texts = {prompt.text for prompt in class_prompts(TABLE.rows[1], found, range(40))}
    assert texts == {"a photo of boot, a {1} on paper", "a photo of boot, a chalk line"}


# ===== what is recorded =====


def test_the_folder_keeps_its_prompts(tmp_path, tiny, capsys):  # noqa: F811
    lines = [{"id": wnid, "prompt": text} for wnid in TABLE.ids for text in ("ink", "chalk", "neon")]
    file, out = written(tmp_path / "p.jsonl", *lines), tmp_path / "out"
    out.mkdir()
    (out / "prompts.jsonl").write_text("as a kill may leave it")
    assert call(out, tiny, "--prompts", file, "--supervision", "captions") == 0
    recipe = json.loads((out / "dataset.json").read_text())["recipe"]
    assert recipe["prompts"] == sha256((out / "prompts.jsonl").read_bytes()).hexdigest()
    assert recipe["supervision"] == "captions of real images" and set(texts_of(out)) == {"ink", "chalk", "neon"}
    before = files_of(out)
    file.unlink()
    (out / "train" / BOOT / f"{BOOT}_000004.jpg").unlink()
    (out / "manifest" / f"{COAT}.jsonl").unlink()
    assert call(out, tiny, "--repair") == 0 and files_of(out) == before
    capsys.readouterr()
    assert call("unused", tiny, "--reproduce", out, "--sample", 21) == 0
    assert "byte-equal: 21" in capsys.readouterr().out
    (out / "prompts.jsonl").write_text((out / "prompts.jsonl").read_text().replace("neon", "nylon"))
    assert call("unused", tiny, "--reproduce", out) == 2
    assert "prompts.jsonl is not what dataset.json records" in capsys.readouterr().err


def test_other_prompts_into_the_same_folder_are_refused(tmp_path, tiny, capsys):  # noqa: F811
    out, file = tmp_path / "out", one_each(tmp_path / "p.tsv", "{name} in ink")
    assert call(out, tiny, "--prompts", file, images=1) == 0
    assert call(out, tiny, "--prompts", one_each(tmp_path / "q.tsv", "{name} in oil"), images=1) == 2
    assert "another recipe: prompts is" in capsys.readouterr().err
    assert call(out, tiny, images=1) == 2
    assert call(out, tiny, "--prompts", file, "--supervision", "captions", images=1) == 2
    assert 'supervision is "class names", asked "captions of real images"' in capsys.readouterr().err
    assert recorded_template(open_dataset(out)).sha256 == read_prompts(file, TABLE).sha256
    assert call(out, tiny, "--prompts", file, images=2) == 0  # it grows as any other


@pytest.mark.parametrize(
    ("text", "grade"), [("c", "class names"), ("a {first_name} in {background}", "class names"), ("c, d_c", "glosses")]
)
def test_a_template_tells_its_supervision(text, grade):
    assert supervision_of(parse_template(text)) == grade


def test_a_report_shows_the_supervision(tmp_path, tiny, capsys):  # noqa: F811
    texts = one_each(tmp_path / "p.tsv", "a written text")
    assert call(tmp_path / "own", tiny, "--prompts", texts, images=1) == 0
    assert "say with --supervision" in capsys.readouterr().err
    assert call(tmp_path / "sd", tiny, images=1) == 0
    sources = {name: open_images(tmp_path / name).source() for name in ("own", "sd")}
    sources["real"] = {"path": "real", "synthetic": False, "supervision": ""}
    found = {
        names: Training(sources=[*map(records_source, map(sources.get, names.split("+")))]).supervision
        for names in ("sd", "own", "real", "real+sd", "own+sd")
    }
    both = "glosses, labelled images"
    assert found == {"sd": "glosses", "own": "", "real": "labelled images", "real+sd": both, "own+sd": ""}


def records_source(recorded: dict):
    from utils.report.records import Source

    return Source(**recorded)


# ===== refused before anything is loaded =====

ALL = [f"{wnid}\tx" for wnid in TABLE.ids]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("p.tsv", ["id\tprompt", *ALL, "n999\tx"], "line 5: class 'n999' is none of --classes"),
        ("p.tsv", ["id\tprompt", *ALL[:2]], f"1 of 3 classes have no prompt ({COAT})"),
        ("p.tsv", ["id\tprompt\tweight", f"{BAG}\tx\theavy"], "line 2: expected float, got str - at $.weight"),
        ("p.tsv", ["id\tprompt\tweight", f"{BAG}\tx\tnan"], "line 2: expected float > 0.0 - at $.weight"),
        ("p.tsv", ["id\tprompt\tweight", f"{BAG}\tx\tinf"], "line 2: expected float <= 1"),
        ("p.tsv", ["id\tprompt\tweight", f"{BAG}\tx\t-1"], "line 2: expected float > 0.0"),
        ("p.tsv", ["id\tprompt", f"{BAG}\t"], "line 2: a prompt is one line of 1 to 4000 characters"),
        ("p.tsv", ["id\tprompt", f"{BAG}\ta {{nmae}}"], "line 2: 'a {nmae}': unknown placeholder {nmae}"),
        ("p.tsv", ["id\tcaption", f"{BAG}\tx"], "column prompt: missing"),
        ("p.jsonl", [{"id": BAG, "prompt": "x", "weight": "2"}], "line 1: expected float, got str - at $.weight"),
        ("p.jsonl", [{"id": BAG}], "line 1: object missing required field prompt"),
        ("p.jsonl", [{"id": BAG, "prompt": "x", "wieght": 2}], "line 1: object contains unknown field wieght"),
        ("p.jsonl", ['{"id": "n1'], "line 1 is not valid JSON"),
        ("p.jsonl", [{"id": BAG, "prompt": "two\nlines"}], "line 1: a prompt is one line"),
        ("p.json", ['{"a": 1}'], "expected array, got object; give a list of captions"),
        ("p.txt", ["a caption of nothing"], "3 of 3 classes have no prompt"),
        ("p.csv", ["id,prompt"], "its name must end in .tsv, .jsonl, .txt, .json"),
        (None, [], "no such file"),
    ],
)
def test_bad_files_are_one_line_before_the_model_is_looked_for(tmp_path, capsys, name, lines, message):
    path = written(tmp_path / name, *lines) if name else tmp_path / "none.tsv"
    assert call(tmp_path / "out", "no/such-model", "--prompts", path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and str(path) in error
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="is not UTF-8"):
        read_prompts(tmp_path / "p.jsonl", TABLE)


def test_a_template_for_all_and_a_file_exclude_each_other(tmp_path, tiny, capsys):  # noqa: F811
    assert call(tmp_path / "out", tiny, "--prompts", one_each(tmp_path / "p.tsv", "x"), "--prompt", "c") == 2
    assert "--prompt: --prompts has the texts" in capsys.readouterr().err
