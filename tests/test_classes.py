"""Class tables: the shipped ones hold the facts known of ImageNet; the user's own are read or refused with a place."""

import ast
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from models.fashion import WNIDS
from utils.classes import (
    CONTROL,
    MOST_IMAGES,
    PROMPTS_DIR,
    SAFE_ID,
    ClassRow,
    format_tsv,
    id_from_name,
    images_per_class,
    load_classes,
    read_classes,
    safe_id,
)
from utils.cli import UserError
from utils.storage import sha256_file

# ===== the shipped tables =====


@pytest.fixture(scope="module")
def imagenet():
    return load_classes("imagenet_1k")


def installed_file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing it (timm and torchvision import torch)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed (pip install -r requirements-dev.lock); CI has it")
    return Path(spec.origin).parent / path


def test_imagenet_has_1000_classes_in_label_order(imagenet):
    synsets = installed_file("timm", "data/_info/imagenet_synsets.txt").read_text().split()
    assert len(synsets) == 1000
    assert imagenet.ids == synsets == sorted(synsets)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in imagenet.ids)


def test_first_names_are_torchvisions_but_for_two(imagenet):
    tree = ast.parse(installed_file("torchvision", "models/_meta.py").read_text())
    (categories,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_IMAGENET_CATEGORIES"
    )
    differ = {
        label: (row.first_name, category)
        for label, (row, category) in enumerate(zip(imagenet.rows, categories, strict=True))
        if row.first_name != category
    }
    assert differ == {134: ("crane", "crane bird"), 639: ("maillot", "maillot tank suit")}


def test_first_names_that_two_classes_share(imagenet):
    def shared(key):
        labels = {}
        for label, row in enumerate(imagenet.rows):
            labels.setdefault(key(row), []).append(label)
        return {name: found for name, found in labels.items() if len(found) > 1}

    assert shared(lambda row: row.first_name) == {"crane": [134, 517], "maillot": [638, 639]}
    folded = shared(lambda row: row.first_name.casefold())
    assert folded == {"crane": [134, 517], "cardigan": [264, 474], "maillot": [638, 639]}
    assert imagenet.ids[134] == "n02012849" and imagenet.ids[517] == "n03126707"
    assert imagenet.ids[638] == "n03710637" and imagenet.ids[639] == "n03710721"
    # One more word tells all 1000 apart: the first name of the hypernym.
    assert shared(lambda row: (row.first_name, row.hypernym.split(",")[0])) == {}


def test_names_shared_by_two_classes(imagenet):
    count = Counter(name for row in imagenet.rows for name in {name.casefold() for name in row.names})
    assert sum(classes == 2 for classes in count.values()) == 19
    assert max(count.values()) == 2


def test_glosses_are_whole_and_without_examples(imagenet):
    cells = [cell for row in imagenet.rows for cell in (row.name, row.hypernym, row.definition)]
    assert all(cells) and all(cell.isascii() for cell in cells)
    assert not any('"' in row.definition for row in imagenet.rows)
    assert sum(";" in row.definition for row in imagenet.rows) == 220  # semicolons inside a definition are kept
    assert not any(row.definition.endswith((";", " ")) for row in imagenet.rows)
    rows = {row.wnid: row for row in imagenet.rows}
    assert rows["n02412080"].definition == "uncastrated adult male sheep"  # a gloss with an example, dropped
    assert rows["n04553703"].definition == "a basin for washing the hands (`wash-hand basin' is a British expression)"
    # Label 836 is a burning lens, whatever its pictures show.
    assert imagenet.rows[836].names == ("sunglass",) and "start a fire" in imagenet.rows[836].definition


def test_imagenet_100_is_the_subset_of_tian_et_al():
    listed = (PROMPTS_DIR / "imagenet_100.txt").read_text().splitlines()
    table = load_classes("100")
    assert table.ids == listed == sorted(set(listed)) and len(listed) == 100
    # Counted against the class lists of ImageNet-R and ImageNet-A: other subsets called ImageNet-100 differ here.
    for file, shared in (("imagenet_r_synsets.txt", 19), ("imagenet_a_synsets.txt", 15)):
        others = installed_file("timm", f"data/_info/{file}").read_text().split()
        assert len(others) == 200
        assert len(set(table.ids) & set(others)) == shared


def test_fashion_is_what_fashion_mnists_labels_mean():
    """The labels 0 to 9 as their authors name them (https://github.com/zalandoresearch/fashion-mnist#labels)."""
    theirs = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
    rows = {row.wnid: row for row in load_classes("fashion").rows}
    assert list(rows) == sorted(WNIDS)
    for name, wnid in zip(theirs, WNIDS, strict=True):
        assert name in [one.lower() for one in rows[wnid].names]


def test_imagenets_names_come_before_the_demos():
    """Two classes are in both; "purse" is also one of the names of a bag."""
    assert load_classes("sandal,purse").ids == ["n04026417", "n04133789"]
    assert load_classes("coat,bag").ids == ["n02774152", "n03057021"]


def test_backgrounds_are_the_365_scenes():
    scenes = (PROMPTS_DIR / "backgrounds.txt").read_text().splitlines()
    assert len(scenes) == len(set(scenes)) == 365
    assert scenes[0] == "airfield" and scenes[-1] == "zen garden"
    assert all(re.fullmatch(r"[a-z' -]+", scene) for scene in scenes)


@pytest.mark.parametrize("name", ["imagenet_1k", "fashion"])
def test_a_shipped_file_is_canonical(name):
    assert load_classes(name).sha256 == sha256_file(PROMPTS_DIR / f"{name}.tsv")


@pytest.mark.parametrize(
    ("spec", "name", "classes"),
    [
        ("100", "imagenet_100", 100),
        (100, "imagenet_100", 100),
        ("imagenet_100", "imagenet_100", 100),
        ("1000", "imagenet_1k", 1000),
        ("1k", "imagenet_1k", 1000),
        ("imagenet_1k", "imagenet_1k", 1000),
        ("fashion", "fashion", 10),
    ],
)
def test_names_of_the_shipped_tables(spec, name, classes):
    table = load_classes(spec)
    assert (table.name, len(table.rows)) == (name, classes)


def test_real_images_per_class(imagenet):
    counts = images_per_class(imagenet, "imagenet")
    assert sum(counts.values()) == 1_281_167
    assert sum(images_per_class(load_classes("100"), "imagenet").values()) == 126_689
    assert (min(counts.values()), max(counts.values())) == (732, 1300)
    assert sum(count == 1300 for count in counts.values()) == 895
    assert list(counts) == imagenet.ids
    assert images_per_class(load_classes("n01440764,coat"), "imagenet") == {"n01440764": 1300, "n03057021": MOST_IMAGES}


def test_the_papers_larger_sets_have_whole_factors_of_the_real_number():
    """The authors' set of ImageNet-100 is 50 times as large as the real one: 6.33 M images (6.5 M as it is quoted)."""
    table = load_classes("100")
    real = images_per_class(table, "imagenet")
    assert images_per_class(table, "1x") == real
    for factor, total in ((10, 1_266_890), (20, 2_533_780), (50, 6_334_450)):
        counts = images_per_class(table, f"{factor}x")
        assert sum(counts.values()) == total
        assert all(counts[wnid] == factor * real[wnid] for wnid in table.ids)


@pytest.mark.parametrize("images", [0, -1, True, 1.5, "ten", None, "0x", "1.5x", "-2x", "x", "10x ", "٣x", "01x"])
def test_images_per_class_refuses_what_is_no_count(imagenet, images):
    with pytest.raises(UserError, match=r"images per class: .* neither 'imagenet', '10x' nor a whole number above 0"):
        images_per_class(imagenet, images)


# ===== choosing classes =====


def test_a_list_of_ids_and_names_is_sorted_by_id():
    table = load_classes(" n03126707, samoyed,Tinca tinca , cardigan,trouser")
    assert table.ids == ["n01440764", "n02111889", "n02963159", "n03126707", "n04489008"]
    assert load_classes("trouser,n01440764,n02963159,Samoyed,n03126707").name == table.name  # the order does not matter
    assert re.fullmatch(r"classes_[0-9a-f]{8}", table.name)


def test_a_file_of_ids_and_names(tmp_path):
    file = tmp_path / "pets.txt"
    file.write_bytes("\ufeff# my pets\r\nSamoyed\r\n\r\ntench, Tinca tinca\r\nn02123045\r\n".encode())
    table = load_classes(file)
    assert table.name == "pets"
    assert [row.first_name for row in table.rows] == ["tench", "Samoyed", "tabby"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("crane", r"'crane' names 2 classes, use an id: n02012849 \(large long-necked.*; n03126707 \(lifts"),
        ("tenhc", r"unknown class 'tenhc'; did you mean 'tench'"),
        ("n01440765", r"unknown class 'n01440765'; did you mean 'n01440764'"),
        ("xyzzy", r"unknown class 'xyzzy'; give an id .* imagenet_1k, imagenet_100, fashion"),
        ("tench,n01440764", r"'n01440764' is class n01440764, already chosen by 'tench'"),
        ("tench,,coat", r"unknown class ''"),
        ("", r"unknown class ''"),
        ("no_such.tsv", r"cannot read no_such.tsv \(No such file"),
    ],
)
def test_unknown_or_ambiguous_classes(spec, message):
    with pytest.raises(UserError, match=message):
        load_classes(spec)


def test_errors_in_a_list_name_the_line(tmp_path):
    file = tmp_path / "pets.txt"
    file.write_text("# pets\ntabby\ndragon\n")
    with pytest.raises(UserError, match=r"pets\.txt, line 3, column 1: unknown class 'dragon'"):
        load_classes(file)
    file.write_text("# nothing\n\n")
    with pytest.raises(UserError, match=r"pets\.txt, line 1, column 1: only comments"):
        load_classes(file)
    other = tmp_path / "birds.csv"
    other.write_text("name\nrobin\n")
    with pytest.raises(UserError, match=r"birds\.csv: a class file ends in \.tsv"):
        load_classes(other)


# ===== the user's own tables =====


def write(tmp_path, text: str | bytes) -> Path:
    path = tmp_path / "my_birds.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_column_of_names_is_enough(tmp_path):
    table = load_classes(write(tmp_path, "name\nBlue Jay, Cyanocitta cristata\nrobin\n鶴\n🐦\nHéron\n"))
    assert table.name == "my_birds"
    rows = {row.wnid: row for row in table.rows}
    assert {"blue_jay", "robin", "heron"} < set(rows)
    assert rows["blue_jay"] == ClassRow("blue_jay", "Blue Jay, Cyanocitta cristata")
    assert table.ids == sorted(table.ids)
    others = set(rows) - {"blue_jay", "robin", "heron"}
    assert len(others) == 2 and all(re.fullmatch(r"class_[0-9a-f]{12}", wnid) for wnid in others)


def test_columns_in_any_order_with_notes_and_quotes(tmp_path):
    text = (
        'Notes\tDefinition\tID\tname\t\t\n\t"a ""blue"" bird, loud"\tb-2\t "jay, jaybird" \t\t\nx\t\ta.1\trobin\t\t\n'
    )
    assert read_classes(write(tmp_path, text)) == (
        ClassRow("a.1", "robin"),
        ClassRow("b-2", "jay, jaybird", "", 'a "blue" bird, loud'),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"line 1, column 1: the file is empty"),
        (b"\xef\xbb\xbf \r\n\r\n", r"line 1, column 1: the file is empty"),
        ("id\tname\n", r"line 2, column name: a header but no class"),
        ("id\tdefinition\na\tb\n", r"line 1, column name: missing; the header has 'id', 'definition'"),
        ("name,definition\na,b\n", r"line 1, column 1: 'name,definition' is one column; separate columns by tabs"),
        ("name\tdefinitoin\na\tb\n", r"line 1, column 2: unknown column 'definitoin'; did you mean 'definition'"),
        ("nmae\na\n", r"line 1, column 1: unknown column 'nmae'; did you mean 'name'"),
        ("id\twnid\tname\na\tb\tc\n", r"line 1, column 2: a second 'wnid' column"),
        ("name\tname\na\tb\n", r"line 1, column 2: a second 'name' column"),
        ("name\tdefinition\n\nrobin\ta\tb\n", r"line 3, column 3: 3 cells where the header has 2; remove the tab"),
        ("id\tname\nr\n", r"line 2, column name: 1 cells where the header has 2"),
        ("id\tname\nr\t\n", r"line 2, column name: empty"),
        ("name\na, , b\n", r"line 2, column name: 'a, , b' has an empty name"),
        ("name\thypernym\na\tb,\n", r"line 2, column hypernym: 'b,' has an empty name"),
        ("id\tname\na\tx\nb\ty\na\tz\n", r"line 4, column id: id 'a' is already used in line 2"),
        ("id\tname\ncat\tx\nCat\ty\n", r"line 3, column id: id 'Cat' is already used in line 2; .* more than case"),
        ("name\ncrane\nCrane, lifting device\n", r"line 3, column name: id 'crane' is already used in line 2; .*`id`"),
        ("id\tname\n../x\ty\n", r"line 2, column id: '\.\./x' cannot be a folder name"),
        ("id\tname\n.hidden\ty\n", r"line 2, column id: '\.hidden' cannot"),
        ("id\tname\n\ty\n", r"line 2, column id: '' cannot"),
        (f"id\tname\n{'a' * 65}\ty\n", r"line 2, column id: 'a{65}' cannot"),
        ("id\tname\né\ty\n", r"line 2, column id: 'é' cannot"),
        ("name\nrobin\x00\n", r"line 2, column 6: control character U\+0000"),
        ("name\rrobin\rjay\r", r"line 1, column 5: control character U\+000D"),
        ("name\nrobin\n\u2028jay\n", r"line 3, column 1: control character U\+2028"),
        ("name\nrobin\n".encode("utf-16"), r"line 1, column 1: UTF-16 text; save the file as UTF-8"),
        ("name\nrobin\nHéron\n".encode("latin-1"), r"line 3, column 2: byte 0xe9 is not UTF-8"),
        (b"\xef\xbb\xbfname\r\n\xff\n", r"line 2, column 1: byte 0xff is not UTF-8"),
        ('name\tdefinition\nrobin\t"a bird\n', r"line 2, column definition: unbalanced quotes"),
        ('name\n"rob"in"\n', r"line 2, column name: unbalanced quotes"),
    ],
)
def test_each_error_names_file_line_and_column(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"my_birds\.tsv, {message}"):
        load_classes(write(tmp_path, text))


def test_a_hundred_thousand_classes(tmp_path):
    names = [f"bird number {number}" for number in range(100_000)]
    table = load_classes(write(tmp_path, "name\n" + "\n".join(names) + "\n"))
    assert len(table.rows) == 100_000
    assert table.ids == sorted(table.ids)
    assert len(table.sha256) == 64


# ===== properties =====

CELL = (
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='\ufeff\u2028\u2029",'), max_size=12)
    .map(str.strip)
    .filter(lambda cell: not cell.startswith('"') and not CONTROL.search(cell))
)
NAME = st.one_of(CELL, st.sampled_from(["🐦", "鶴", "鹤 crane", "कौआ", "Héron cendré", "o’neill"])).filter(bool)
ROW = st.builds(
    lambda wnid, names, hypernym, definition: ClassRow(wnid, ", ".join(names), hypernym, definition),
    st.from_regex(SAFE_ID, fullmatch=True),
    st.lists(NAME, min_size=1, max_size=3),
    CELL,
    CELL,
)
ROWS = st.lists(ROW, min_size=1, max_size=6, unique_by=lambda row: row.wnid.casefold())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS, bom=st.booleans(), crlf=st.booleans(), blank=st.sampled_from(["", "\n", " \n\t\t\n"]))
def test_what_is_written_is_read_back(tmp_path_factory, rows, bom, crlf, blank):
    text = format_tsv(rows).replace("\n", "\n" + blank)
    if crlf:
        text = text.replace("\n", "\r\n")
    path = tmp_path_factory.getbasetemp() / "round.tsv"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    assert read_classes(path) == tuple(sorted(rows, key=lambda row: row.wnid))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS, data=st.data())
def test_a_tab_in_a_cell_and_a_row_given_twice(tmp_path_factory, rows, data):
    path = tmp_path_factory.getbasetemp() / "wrong.tsv"
    lines = [line + "\n" for line in format_tsv(rows).removesuffix("\n").split("\n")]
    number = data.draw(st.integers(2, len(lines)))
    cell = data.draw(st.integers(0, 3))
    cells = lines[number - 1].rstrip("\n").split("\t")
    at = data.draw(st.integers(0, len(cells[cell])))
    cells[cell] = cells[cell][:at] + "\t" + cells[cell][at:]
    path.write_bytes("".join([*lines[: number - 1], "\t".join(cells) + "\n", *lines[number:]]).encode())
    with pytest.raises(UserError, match=rf"wrong\.tsv, line {number}, column 5: 5 cells where the header has 4"):
        load_classes(path)
    path.write_bytes("".join([*lines, "\n", lines[number - 1]]).encode())
    place = rf"wrong\.tsv, line {len(lines) + 2}, column id: id .* already used in line {number};"
    with pytest.raises(UserError, match=place):
        load_classes(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('name\tid\n\r"\x0b\ufeff ,a🐦'), max_size=60).map(str.encode),
        st.binary(max_size=30).map(lambda tail: b"id\tname\nx\ty\n" + tail),
    )
)
@example(data=b"\xef\xbb\xbf\xef\xbb\xbfname\na\n")
def test_any_bytes_are_a_table_or_an_error_with_a_place(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    path.write_bytes(data)
    try:
        table = load_classes(path)
    except UserError as error:
        place = re.match(r".*any\.tsv, line (\d+), column (\S+): .", str(error))
        assert place and "\n" not in str(error), str(error)
        assert 1 <= int(place[1]) <= data.count(b"\n") + 2
    else:
        assert table.rows and all(SAFE_ID.fullmatch(wnid) for wnid in table.ids)
        assert all(all(row.names) for row in table.rows)
        assert len({wnid.casefold() for wnid in table.ids}) == len(table.rows)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=NAME, other=NAME)
def test_derived_ids_are_safe_and_stable(name, other):
    wnid = id_from_name(name)
    assert SAFE_ID.fullmatch(wnid) and wnid == id_from_name(name)
    if not name.isascii() and not other.isascii() and "_" in wnid and id_from_name(other) == wnid:
        # Letters that a slug cannot hold are told apart by the hash; accents and case alone are not.
        assert not re.search(r"_[0-9a-f]{12}$", wnid) or name == other


def test_long_names_get_short_ids():
    first, second = id_from_name("very " * 30 + "long"), id_from_name("very " * 30 + "short")
    assert first != second and len(first) <= 64


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_a_regular_file_is_a_table(tmp_path, kind):
    """A FIFO blocked for ever, /dev/zero took all memory."""
    path = tmp_path / "birds.tsv"
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(UserError, match=r"cannot read .*birds\.tsv \("):
        load_classes(path)


def test_a_cell_that_no_prompt_could_use_is_refused_at_the_door(tmp_path):
    path = tmp_path / "birds.tsv"
    path.write_text("name\tdefinition\nrobin\t" + "x" * 4000 + "\n")
    assert len(load_classes(path).rows[0].definition) == 4000
    path.write_text("name\tdefinition\nrobin\t" + "x" * 65_537 + "\n")
    with pytest.raises(UserError, match=r"birds\.tsv, line 2, column definition: 65,537 characters; at most 4,000"):
        load_classes(path)


@pytest.mark.parametrize("text", ["/etc", "../x", "a/b", "a\nb", "", ".", "a" * 65, None, 5, ["n1"], "a\0"])
def test_an_id_from_elsewhere_is_never_a_path(text):
    with pytest.raises(UserError, match=r"^dataset\.json, classes: .* cannot be a folder name"):
        safe_id(text, "dataset.json, classes")
    assert safe_id("n01440764", "x") == "n01440764"
