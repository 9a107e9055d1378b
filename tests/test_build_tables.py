"""Rebuilding the class tables: from a WordNet of five synsets, and from the real one, byte for byte."""

import importlib.util
from pathlib import Path

import pytest

from utils.classes import PROMPTS_DIR, load_classes
from utils.cli import run

spec = importlib.util.spec_from_file_location("build_tables", PROMPTS_DIR / "build_tables.py")
build_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_tables)

WORDNET = Path(build_tables.WORDNET)
needs_wordnet = pytest.mark.skipif(
    not WORDNET.is_file(), reason=f"no {WORDNET} (apt-get install wordnet-base); CI has it"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="no timm (pip install -r requirements-dev.lock); CI has it"
)


def build(*arguments) -> int:
    return run(build_tables.main, build_tables.get_args_parser(), [str(argument) for argument in arguments])


@pytest.fixture
def small_wordnet(tmp_path, monkeypatch):
    """Two classes in WordNet's file format: hexadecimal word counts, several hypernyms, examples, semicolons."""
    lines, wnids = [b"  1 a licence of the real file comes first\n"], {}

    def add(key: str, rest: str) -> None:
        offset = sum(map(len, lines))
        wnids[key] = f"n{offset:08d}"
        lines.append(f"{offset:08d} {rest}  \n".encode())

    def pointer(symbol: str, key: str) -> str:
        return f"{symbol} {wnids[key][1:]} n 0000"

    add("tool", "06 n 02 hand_tool 0 tool 1 000 | a thing; that helps")
    add("toy", "06 n 01 toy 0 000 | a plaything")
    ten_more = " ".join(f"name_{number} 0" for number in range(10))
    pointers = " ".join([pointer("~", "toy"), pointer("@", "tool"), pointer("@", "toy"), pointer("#p", "toy")])
    add("top", f'06 n 0b top 0 {ten_more} 004 {pointers} | spins; on its point; "a red top"; "it fell"')
    add("saw", f"06 n 01 saw 0 001 {pointer('@', 'toy')} | cuts (`rip saw' is one)")

    wordnet = tmp_path / "data.noun"
    wordnet.write_bytes(b"".join(lines))
    synsets = tmp_path / "synsets.txt"
    synsets.write_text(f"{wnids['top']}\n{wnids['saw']}\n")
    monkeypatch.setattr(build_tables, "FASHION", (wnids["saw"],))
    out = tmp_path / "tables"
    out.mkdir()
    return ["--wordnet", wordnet, "--synsets", synsets, "--out", out], wnids, out


def test_columns_from_wordnet(small_wordnet):
    options, wnids, out = small_wordnet
    assert build(*options) == 0
    names = ", ".join(["top", *(f"name {number}" for number in range(10))])
    assert (out / "imagenet_1k.tsv").read_text() == (
        "wnid\tname\thypernym\tdefinition\n"
        # The first hypernym listed; the gloss with its semicolon and without its examples.
        f"{wnids['top']}\t{names}\thand tool, tool\tspins; on its point\n"
        f"{wnids['saw']}\tsaw\ttoy\tcuts (`rip saw' is one)\n"
    )
    assert load_classes(out / "fashion.tsv").ids == [wnids["saw"]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda data: data.replace(b"on its point", b"on its  point"), 2),
        (lambda data: data.replace(b"\n", b"\r\n"), 1),
        (lambda data: data.removesuffix(b"\n"), 3),
        (lambda data: data + b"n00000001\tmore\tmore\tmore\n", 4),
        (lambda data: b"", 1),
    ],
)
def test_check_names_the_first_line_that_differs(small_wordnet, capsys, change, line):
    options, _, out = small_wordnet
    assert build(*options) == 0
    table = out / "imagenet_1k.tsv"
    assert build(*options, "--check") == 0
    changed = change(table.read_bytes())
    table.write_bytes(changed)
    capsys.readouterr()
    assert build(*options, "--check") == 2
    assert f"{table}, line {line}: " in capsys.readouterr().err
    assert table.read_bytes() == changed  # a check mends nothing


def test_missing_or_wrong_sources(small_wordnet, tmp_path, capsys):
    options, _, out = small_wordnet
    assert build(*options[2:], "--wordnet", tmp_path / "none") == 2
    assert "apt-get install wordnet-base" in capsys.readouterr().err
    assert build(*options[:2], *options[4:], "--synsets", tmp_path / "none.txt") == 2
    assert f"cannot read {tmp_path / 'none.txt'}" in capsys.readouterr().err
    for wrong, message in [("n00000003", "n00000003 is not a noun"), ("tench", "'tench' is not a wnid")]:
        (tmp_path / "other.txt").write_text(f"{wrong}\n")
        assert build(*options[:2], *options[4:], "--synsets", tmp_path / "other.txt") == 2
        assert message in capsys.readouterr().err
    assert list(out.iterdir()) == []


# ===== against the real sources =====


@needs_wordnet
@needs_timm
def test_shipped_tables_are_as_their_sources_say(tmp_path, capsys):
    assert build("--check") == 0
    assert build("--out", tmp_path) == 0
    for file in ("imagenet_1k.tsv", "fashion.tsv"):
        assert (tmp_path / file).read_bytes() == (PROMPTS_DIR / file).read_bytes()


@needs_wordnet
def test_facts_that_only_wordnet_knows():
    several, examples = {}, 0
    with WORDNET.open("rb") as wordnet:
        for row in load_classes("1k").rows:
            lemmas, hypernyms, gloss = build_tables.read_synset(wordnet, row.wnid)  # raises if WordNet lacks it
            assert tuple(lemmas) == row.names
            assert gloss.startswith(row.definition)
            examples += gloss != row.definition
            if len(hypernyms) > 1:
                several[row.wnid] = row.first_name
                assert row.hypernym == ", ".join(build_tables.read_synset(wordnet, hypernyms[0])[0])
    assert examples == 28
    assert len(several) == 38
    ours = load_classes("100").ids
    assert sorted(name for wnid, name in several.items() if wnid in ours) == ["computer keyboard", "jean"]


@needs_wordnet
def test_for_209_classes_the_first_name_means_something_else_first():
    """Why every table is keyed by wnid: looking a name up in WordNet finds another synset for a fifth of ImageNet."""
    senses = {}
    for line in WORDNET.with_name("index.noun").read_text().splitlines():
        if not line.startswith(" "):
            fields = line.split()
            senses[fields[0]] = [field for field in fields[-int(fields[2]) :]]  # offsets, most frequent sense first
    rows = load_classes("1k").rows
    other = [row for row in rows if senses[row.first_name.lower().replace(" ", "_")][0] != row.wnid[1:]]
    assert len(other) == 209
