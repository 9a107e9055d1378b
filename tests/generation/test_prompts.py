"""Prompts: the same list for ever, streamed; templates checked before anything runs; warnings that name the class."""

import json
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.classes import ClassRow, ClassTable, imagenet_counts, images_per_class, load_classes
from utils.cli import UserError, run
from utils.generation import prompts
from utils.generation.prompts import (
    NAMES,
    TEMPLATES,
    Prompt,
    class_prompts,
    image_seed,
    kept_part,
    parse_template,
    prompt_text,
    prompt_warnings,
    token_counter,
)

ROOT = Path(__file__).resolve().parents[2]
TENCH = ClassRow("n01440764", "tench, Tinca tinca", "cyprinid, cyprinid fish", "a fish; of Europe")
BARE = ClassRow("jay", "jay")


def table_prompts(table, template, counts, seed=0, names="first"):
    """All prompts of a table, class by class in label order."""
    for row in table.rows:
        yield from class_prompts(
            row, template, range(counts if isinstance(counts, int) else counts[row.wnid]), seed, names
        )


# ===== the lists never change =====

# First 16 digits of the sha256 of "id<TAB>index<TAB>text<TAB>seed<NEWLINE>" for 3 images a class, base seed 0.
# Another hash is another dataset: a template that must change gets a new name.
GOLDEN = {
    ("imagenet_100", "c", "first"): "78358107ae7aac27",
    ("imagenet_100", "c", "all"): "07542dde80061a27",
    ("imagenet_100", "c, h_c", "first"): "c335370b1688f225",
    ("imagenet_100", "c, h_c", "all"): "e171d722c1916967",
    ("imagenet_100", "c, d_c", "first"): "751f61c91d37a11d",
    ("imagenet_100", "c, d_c", "all"): "c08822de211b5594",
    ("imagenet_100", "c, h_c inside b", "first"): "2d4429d68553e731",
    ("imagenet_100", "c, h_c inside b", "all"): "32c1bc88ec08c01e",
    ("imagenet_1k", "c", "first"): "9e47e3ad4974303b",
    ("imagenet_1k", "c", "all"): "6834d0ebc2bda936",
    ("imagenet_1k", "c, h_c", "first"): "28902f0b5f83ddf5",
    ("imagenet_1k", "c, h_c", "all"): "ea184cd0fba61ca3",
    ("imagenet_1k", "c, d_c", "first"): "7d792ad0c415f871",
    ("imagenet_1k", "c, d_c", "all"): "6b5b9160f80a607a",
    ("imagenet_1k", "c, h_c inside b", "first"): "6faafe76d1968bbf",
    ("imagenet_1k", "c, h_c inside b", "all"): "deae874e0069d70d",
    ("fashion", "c", "first"): "22fddfa6061338cb",
    ("fashion", "c", "all"): "6e734286afdfc8c5",
    ("fashion", "c, h_c", "first"): "824f57f8cda035aa",
    ("fashion", "c, h_c", "all"): "02d262333175cd51",
    ("fashion", "c, d_c", "first"): "280ea0fc142dc705",
    ("fashion", "c, d_c", "all"): "9d96a67ffb62466a",
    ("fashion", "c, h_c inside b", "first"): "521ef3d2083bd5cb",
    ("fashion", "c, h_c inside b", "all"): "b6f6139be52d1c1c",
}


def list_hash(lines) -> str:
    digest = sha256()
    for prompt in lines:
        digest.update(f"{prompt.wnid}\t{prompt.index}\t{prompt.text}\t{prompt.seed}\n".encode())
    return digest.hexdigest()


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("classes", ["imagenet_100", "imagenet_1k", "fashion"])
def test_golden_lists(classes, template, names):
    listed = table_prompts(load_classes(classes), parse_template(template), 3, 0, names)
    assert list_hash(listed)[:16] == GOLDEN[classes, template, names]


def test_golden_seeds_and_backgrounds():
    assert image_seed(0, "n01440764", 0) == 6330537071284250568
    assert image_seed(0, "n01440764", 0, attempt=1) == 4096621656493576969
    assert image_seed(-1, "jay", 12345) == 2354289068155496976
    listed = list(class_prompts(load_classes("1k").rows[0], parse_template("c, h_c inside b"), range(2)))
    assert [prompt.text for prompt in listed] == [
        "tench, cyprinid inside hospital",
        "tench, cyprinid inside outdoor diner",
    ]


STREAM = """
import resource, sys, time
from hashlib import sha256
from utils.classes import images_per_class, load_classes
from utils.generation.prompts import class_prompts, parse_template
table = load_classes("imagenet_1k")
counts = images_per_class(table, "imagenet")
start = time.process_time()
digest, number = sha256(), 0
template = parse_template(sys.argv[1])
for prompt in (prompt for row in table.rows for prompt in class_prompts(row, template, range(counts[row.wnid]))):
    digest.update(f"{prompt.wnid}\\t{prompt.index}\\t{prompt.text}\\t{prompt.seed}\\n".encode())
    number += 1
    if number == 20_000:
        early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(number, digest.hexdigest(), late - early, time.process_time() - start, "torch" in sys.modules)
"""


def test_all_of_imagenet_is_streamed_in_seconds_and_constant_memory():
    command = [sys.executable, "-c", STREAM, "c, h_c inside b"]  # the template that does most
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert output[:2] == ["1281167", "e24a97275652e13ab2dd683542408b2c12e33a68a1a78233b7b79404715ae680"]
    assert int(output[2]) < 4096, "KiB more after 1.28 million prompts than after 20 000"
    assert float(output[3]) < 30, "seconds of CPU time"  # about 4 here
    assert output[4] == "False"


# ===== what a prompt is =====


@pytest.mark.parametrize(
    ("template", "first", "all_names"),
    [
        ("c", "tench", "tench, Tinca tinca"),
        ("c, h_c", "tench, cyprinid", "tench, Tinca tinca, cyprinid, cyprinid fish"),
        ("c, d_c", "tench, a fish; of Europe", "tench, Tinca tinca, a fish; of Europe"),
        (" c, d_c ", "tench, a fish; of Europe", "tench, Tinca tinca, a fish; of Europe"),
        (
            "c, h_c inside b",
            "tench, cyprinid inside airfield",
            "tench, Tinca tinca, cyprinid, cyprinid fish inside airfield",
        ),
        ("a photo of {name}, {definition}", "a photo of tench, a fish; of Europe", None),
        ("{first_name}: {name} in {background}", "tench: tench in airfield", "tench: tench, Tinca tinca in airfield"),
        ("{{{name}}} 🐟", "{tench} 🐟", "{tench, Tinca tinca} 🐟"),
    ],
)
def test_templates(template, first, all_names):
    parsed = parse_template(template)
    assert prompt_text(TENCH, parsed, 0) == prompt_text(TENCH, parsed, 0, "first") == first
    if all_names:
        assert prompt_text(TENCH, parsed, 0, "all") == all_names


def test_the_papers_names_stand_for_free_texts():
    for name, pattern in TEMPLATES.items():
        ours, free = (list(class_prompts(TENCH, parse_template(text), range(5))) for text in (name, pattern))
        assert ours == free


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("c, d_c", "jay"),
        ("c, h_c", "jay"),
        ("c, h_c inside b", "jay inside airfield"),
        ("a {name}, {hypernym}, {definition}!", "a jay!"),
        ("{name} ({definition})", "jay ()"),
    ],
)
def test_an_empty_column_takes_its_comma_with_it(template, text):
    assert prompt_text(BARE, parse_template(template), 0) == text


def test_cells_are_never_read_as_templates():
    row = ClassRow("x", "{name} %s {", "{hypernym}", "{0} \\1")
    assert prompt_text(row, parse_template("c, d_c"), 0) == "{name} %s {, {0} \\1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {nmae}", r"unknown placeholder \{nmae\}; known: \{name\} \{first_name\} \{hypernym\} \{definition\}"),
        ("{}", r"unknown placeholder \{\}"),
        ("{name.__class__}", r"unknown placeholder \{name\.__class__\}"),
        ("{name!r}", r"unknown placeholder \{name!r\}"),
        ("{name:>{hypernym}}", r"unknown placeholder \{name:>\{hypernym\}\}"),
        ("a {name", r"expected '}'.*write \{\{ or \}\}"),
        ("a name}", r"Single '}'.*write \{\{ or \}\}"),
        ("c,d_c", r"says nothing of the class.* 'c, d_c'"),
        ("", r"says nothing of the class"),
        ("a photo, {background}", r"says nothing of the class"),
        ("{name}\n", r"control character"),
        ("\t{name}", r"control character"),
        ("\udce9 {name}", r"control character"),  # a byte of the command line that is not UTF-8
    ],
)
def test_templates_are_refused_before_anything_runs(template, message):
    with pytest.raises(UserError, match=message):
        parse_template(template)


def test_unknown_names_option():
    with pytest.raises(UserError, match="--names 'some': choose one of first, all"):
        prompt_text(TENCH, parse_template("c"), 0, "some")
    with pytest.raises(UserError, match="--names 'some'"):
        next(class_prompts(TENCH, parse_template("c"), range(1), names="some"))


# ===== seeds =====


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(), index=st.integers(0, 10**7), attempt=st.integers(0, 100))
def test_seeds_fit_every_generator(seed, index, attempt):
    assert 0 <= image_seed(seed, "n01440764", index, attempt) < 2**63


def test_seeds_differ_by_class_index_attempt_and_base_seed_only():
    seeds = {
        image_seed(seed, wnid, index, attempt)
        for seed in (0, 1)
        for wnid in ("a", "a1", "b")
        for index in (0, 1, 11)
        for attempt in (0, 1)
    }
    assert len(seeds) == 2 * 3 * 3 * 2
    lists = [list(class_prompts(TENCH, parse_template(template), range(4), seed=7)) for template in TEMPLATES]
    assert len({tuple(prompt.seed for prompt in listed) for listed in lists}) == 1


def test_a_longer_list_begins_with_the_shorter():
    template = parse_template("c, h_c inside b")
    assert list(class_prompts(TENCH, template, range(5))) == list(class_prompts(TENCH, template, range(9)))[:5]


def test_prompt_text_agrees_with_the_list():
    for template in map(parse_template, TEMPLATES):
        for prompt in class_prompts(TENCH, template, range(50), seed=3, names="all"):
            assert prompt.seed == image_seed(3, TENCH.wnid, prompt.index)
            assert prompt.text == prompt_text(TENCH, template, prompt.seed, "all")


def test_backgrounds_are_drawn_evenly():
    listed = class_prompts(TENCH, parse_template("{name}|{background}"), range(36_500))
    drawn = Counter(prompt.text.split("|")[1] for prompt in listed)
    assert len(drawn) == 365
    assert sum((count - 100) ** 2 / 100 for count in drawn.values()) < 480  # chi-square, 364 degrees: p about 1e-4


def test_lists_run_class_by_class():
    table = load_classes("fashion")
    template = parse_template("c")
    listed = list(table_prompts(table, template, 2, seed=5))
    assert [prompt.wnid for prompt in listed] == [wnid for wnid in table.ids for _ in range(2)]
    assert listed[0] == Prompt(table.ids[0], 0, "bag", image_seed(5, table.ids[0], 0))
    counts = dict.fromkeys(table.ids, 0) | {table.ids[3]: 2}
    assert [(prompt.wnid, prompt.index) for prompt in table_prompts(table, template, counts)] == [
        (table.ids[3], 0),
        (table.ids[3], 1),
    ]
    # 1.28 million prompts are not built to look at the first.
    everything = table_prompts(load_classes("1k"), template, images_per_class(load_classes("1k"), "imagenet"))
    assert next(islice(everything, 1300, None)).wnid == "n01443537"


def test_without_the_counts_imagenet_is_refused(monkeypatch, tmp_path):
    imagenet_counts.cache_clear()
    monkeypatch.setattr("utils.classes.PROMPTS_DIR", tmp_path)
    with pytest.raises(UserError, match=r"imagenet_counts\.tsv is missing.*give a number instead"):
        images_per_class(ClassTable("x", (TENCH,)), "imagenet")


# ===== warnings =====


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("classes", ["imagenet_100", "imagenet_1k", "fashion"])
def test_the_released_models_prompts_have_no_warning(classes, names):
    assert prompt_warnings(load_classes(classes), parse_template("c, d_c"), names) == []


def test_bare_names_are_shared_by_three_pairs_of_classes():
    # Cardigan the dog and cardigan the knitwear too: CLIP's tokenizer lower-cases.
    assert prompt_warnings(load_classes("1k"), parse_template("c")) == [
        "same prompt for 2 classes (n02012849, n03126707): 'crane'",
        "same prompt for 2 classes (n02113186, n02963159): 'cardigan'",
        "same prompt for 2 classes (n03710637, n03710721): 'maillot'",
    ]
    assert prompt_warnings(load_classes("1k"), parse_template("c, h_c")) == []
    assert prompt_warnings(load_classes("100"), parse_template("c")) == []


def test_empty_columns_are_told_where_the_template_needs_them():
    table = ClassTable("birds", (BARE, TENCH))
    assert prompt_warnings(table, parse_template("c, d_c"), count_tokens=words) == [
        "no definition for 1 class (jay): their prompts go without it, as 'jay'"
    ]
    assert prompt_warnings(table, parse_template("c"), count_tokens=words) == []


def test_what_clip_cuts_off_is_shown():
    table = ClassTable("birds", (BARE, TENCH))
    assert prompt_warnings(table, parse_template("c, d_c"), count_tokens=words, max_tokens=2)[1:] == [
        "n01440764: 5 tokens, CLIP reads 2; cut off: 'fish; of Europe'"
    ]
    # Judged with the scene of most words, whichever the first image draws.
    longest = max(map(words, prompts.backgrounds()))
    template = parse_template("{name} {background}")
    assert prompt_warnings(table, template, count_tokens=words, max_tokens=1 + longest) == []
    assert len(prompt_warnings(table, template, count_tokens=words, max_tokens=longest)) == 2
    # A first word that is too long alone is cut whole.
    assert "cut off: 'tench" in prompt_warnings(table, parse_template("c"), "all", len, 3)[-1]


def test_without_a_tokenizer_nothing_is_said_of_tokens():
    table = ClassTable("birds", (ClassRow("jay", "jay", "", "bird " * 100),))
    assert prompt_warnings(table, parse_template("c, d_c")) == []


def test_many_warnings_of_a_kind_are_cut_short():
    rows = tuple(ClassRow(f"id{number}", f"name {number // 2}") for number in range(100))
    warnings = prompt_warnings(ClassTable("x", rows), parse_template("c"))
    assert len(warnings) == 21 and warnings[-1] == "... and 30 more of this kind"


# ===== CLIP tokens =====


def save_tokenizer(folder: Path) -> Path:
    """A CLIP tokenizer of single bytes and the merge "ab", in the layout of Stable Diffusion 1.4's repository."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    vocabulary = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        "ab",
        "ab</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("text", "tokens"), [("", 2), ("x", 3), ("ab", 3), ("ABAB", 4), ("ab, abc 12!", 2 + 7)])
def test_counts_of_a_models_own_tokenizer(tmp_path, text, tokens):
    save_tokenizer(tmp_path / "model" / "tokenizer")
    count, max_tokens = token_counter(str(tmp_path / "model"))
    assert count(text) == tokens
    assert max_tokens == 20


def test_a_tokenizer_saved_by_transformers_counts_alike(tmp_path):
    from transformers import CLIPTokenizer

    save_tokenizer(tmp_path / "old" / "tokenizer")
    old, most_of_old = token_counter(str(tmp_path / "old"))
    CLIPTokenizer.from_pretrained(tmp_path / "old" / "tokenizer").save_pretrained(tmp_path / "new" / "tokenizer")
    assert (tmp_path / "new" / "tokenizer" / "tokenizer.json").is_file()
    new, most_of_new = token_counter(str(tmp_path / "new"))
    text = "Abba, a bag of 365 cabs — 鶴 🐦"
    assert new(text) == old(text) > 20  # and no warning of a text longer than the model reads
    assert most_of_new == most_of_old


def test_a_tokenizer_that_cuts_and_pads_counts_what_is_there(tmp_path):
    """models/fashion-sd, as many others, has both saved in its tokenizer.json: 279 tokens would count as 77."""
    settings = json.loads((ROOT / "models/fashion-sd/tokenizer/tokenizer.json").read_text())
    assert settings["truncation"] and settings["padding"]
    count, _ = token_counter(str(ROOT / "models/fashion-sd"))
    assert count("coat") < 10 and count("coat, " * 100) > 200
    table = ClassTable("birds", (ClassRow("jay", "jay", "", "coat " * 100),))
    (warning,) = prompt_warnings(table, parse_template("c, d_c"), count_tokens=count)
    assert "CLIP reads 77; cut off: 'coat coat" in warning


def test_half_a_tokenizer_is_none(tmp_path):
    folder = save_tokenizer(tmp_path / "model" / "tokenizer")
    (folder / "merges.txt").unlink()
    assert token_counter(str(tmp_path / "model")) is None


@pytest.mark.parametrize("model", ["", "no/where", "/no/such/folder", "CompVis/stable-diffusion-v1-4", "../x"])
def test_an_absent_tokenizer_is_none_and_not_an_empty_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert token_counter(model) is None


def test_the_hub_cache_is_looked_into_without_a_network(tmp_path):
    repository = tmp_path / "models--some--model"
    save_tokenizer(repository / "snapshots" / "0123abc" / "tokenizer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    command = [
        sys.executable,
        "-m",
        "utils.generation.prompts",
        "--classes",
        "tench",
        "--prompt",
        "c, d_c",
        "--model",
        "some/model",
    ]
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    letters = "freshwater dace-like game fish of Europe and western Asia noted for ability to survive outside water"
    tokens = 2 + len("tench,") + len(letters.replace(" ", "")) - letters.count("ab")
    assert result.stdout.rstrip().endswith(f"\t{tokens}")
    assert f"warning: n01440764: {tokens} tokens, CLIP reads 20; cut off: " in result.stderr


def test_kept_part_ends_at_a_word():
    count = len
    assert kept_part("one two three", count, 13) == "one two three"
    assert kept_part("one two three", count, 12) == "one two"
    assert kept_part("one two three", count, 2) == ""
    assert kept_part("", count, 2) == ""


# ===== the inspector =====


def inspect(*arguments: str) -> int:
    return run(prompts.main, prompts.get_args_parser(), list(arguments))


def test_inspector_prints_id_text_and_tokens(capsys):
    assert inspect("--classes", "1k", "--prompt", "c", "--limit", "2") == 0
    output = capsys.readouterr()
    assert output.out == "n01440764\ttench\nn01443537\tgoldfish\n"
    notes = output.err.splitlines()
    assert notes[0].startswith("note: no tokenizer of CompVis/stable-diffusion-v1-4 on this machine")
    assert [note.split(" (")[0] for note in notes[1:]] == ["warning: same prompt for 2 classes"] * 3


def test_inspector_as_json(capsys):
    assert inspect("--classes", "fashion", "--prompt", "{name} in {background}", "--names", "all", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"] == "fashion" and report["names"] == "all" and report["tokens"] == "unknown"
    assert {item["tokens"] for item in report["prompts"]} == {None}
    assert [item["id"] for item in report["prompts"]] == load_classes("fashion").ids
    assert report["prompts"][0]["prompt"].startswith("bag, handbag, pocketbook, purse in ")
    assert report["sha256"] == load_classes("fashion").sha256
    assert report["warnings"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "crane"], "--classes: 'crane' names 2 classes"),
        (["--prompt", "{nmae}"], "unknown placeholder {nmae}"),
        (["--classes", "none.tsv"], "cannot read none.tsv"),
    ],
)
def test_inspector_says_what_to_mend(arguments, message, capsys):
    assert inspect(*arguments) == 2
    assert message in capsys.readouterr().err


def test_inspector_runs_as_a_module_without_torch():
    code = "import sys, runpy; sys.argv[1:] = ['--limit', '1']\n"
    code += "try: runpy.run_module('utils.prompts', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False", result.stderr
    assert result.stdout.startswith("n01558993\trobin, large American thrush")
