"""Tables: CSV and Parquet files with a path and a class in each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data.sources import open_source
from flatmin.data.sources.base import Source

HALVES = {"train": "train[:50%]", "test": "train[50%:]"}
ROWS = [("a/1.png", "cat"), ("a/2.png", "dog"), ("b/1.png", "cat"), ("b/2.png", "dog")]
TEXT = "image,label\n" + "".join(f"{image},{label}\n" for image, label in ROWS)


def write(folder: Path, text: str | bytes, name: str = "table.csv", **options: Any) -> Path:
    for image, _ in ROWS:
        (folder / image).parent.mkdir(exist_ok=True, parents=True)
        (folder / image).write_bytes(image.encode())
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(**options))
    return path


def write_parquet(folder: Path, columns: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    from pyarrow import parquet

    path = write(folder, b"", "table.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def opened(table: Path, splits: dict[str, str] | None = HALVES, **changes: Any) -> Source:
    carved = {"val_fraction": 0.1} if splits and "val" not in splits else {}
    values = {"source": "table", "name": str(table), "splits": splits, **carved, **changes}
    return open_source(Data.model_validate(values))


def refused(table: Path, splits: dict[str, str] | None = HALVES, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        opened(table, splits, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def classes(source: Source, expression: str = "train") -> dict[str, str]:
    return {example.name: source.class_names[example.label] for example in source.examples(expression)}


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("\n"),
        TEXT + "\n\n",
        TEXT.replace("\n", "\r\n"),
        "\ufeff" + TEXT,
        TEXT.replace("a/1.png", '"./a//1.png"').replace("cat", " cat "),
        "group,label,image,note\n" + "".join(f'p1,{label},{image},"x, ""y"""\n' for image, label in ROWS),
    ],
)
def test_table_gives_the_bytes_and_classes_of_its_rows(text: str, tmp_path: Path) -> None:
    source = opened(write(tmp_path, text))
    assert source.class_names == ["cat", "dog"]
    assert classes(source) == dict(ROWS)
    assert all(example.image == example.name.encode() for example in source.examples("train"))
    assert (source.ignored, list(source.empty)) == ({}, [])


def test_table_version_is_that_of_rows_and_files(tmp_path: Path) -> None:
    version = opened(write(tmp_path, TEXT)).version
    assert opened(write(tmp_path, "\ufeff" + TEXT), seed=3).version == version
    assert opened(write(tmp_path, TEXT.replace("1.png,cat", "1.png,dog", 1))).version != version
    table = write(tmp_path, TEXT)
    (tmp_path / "a" / "1.png").write_bytes(b"longer than before")
    assert opened(table).version != version


def test_table_with_other_column_names_reads_them(tmp_path: Path) -> None:
    text = TEXT.replace("image,label", "path,breed")
    columns = {"image": "path", "label": "breed"}
    assert classes(opened(write(tmp_path, text), columns=columns)) == dict(ROWS)
    assert refused(write(tmp_path, text)) == (
        f"data.columns.image: expected one column 'image' in {tmp_path}/table.csv, received 'path', 'breed'"
    )
    columns["split"] = "fold"
    assert refused(write(tmp_path, text), columns=columns).startswith("data.columns.split: expected one column 'fold'")


def test_table_with_splits_takes_them(tmp_path: Path) -> None:
    text = "image,label,split\na/1.png,cat,train\na/2.png,dog,train\nb/1.png,cat,valid\nb/2.png,cat, test\n"
    source = opened(write(tmp_path, text), None)
    assert source.expressions == {"train": "train", "val": "valid", "test": "test"}
    assert classes(source) == {"a/1.png": "cat", "a/2.png": "dog"}
    roles = {"train": "train", "test": "test"}
    assert "expected a role for each split, received valid (1)" in refused(write(tmp_path, text), roles)
    text = text.replace(" test", "")
    assert refused(write(tmp_path, text), roles).endswith("line 5: expected a split, received none for 'b/2.png'")


def test_table_without_splits_predicts_rows_without_a_label(tmp_path: Path) -> None:
    table = write(tmp_path, TEXT + "c/1.png,\nc/2.png, \n")
    source = opened(table, HALVES | {"predict": "predict"})
    assert [(example.name, example.label) for example in source.examples("predict")] == [
        ("c/1.png", -1),
        ("c/2.png", -1),
    ]
    assert len(source.labels("train")) == 4
    assert refused(table) == (
        "data.splits: expected a role for each split, received predict (2) unused; write data.splits.predict: predict,"
        " or data.splits.unused: predict"
    )


def test_table_with_labels_missing_in_a_split_is_refused(tmp_path: Path) -> None:
    text = "image,label,split\na/1.png,cat,train\na/2.png,,train\nb/1.png,dog,train\nb/2.png,cat,test\n"
    message = refused(write(tmp_path, text), {"train": "train", "test": "test"})
    expected = "data.name: expected all or none of the images of 'train' with a label, received 'a/2.png' without one"
    assert message == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace(",", ";"), "{table}: expected columns separated by commas, received semicolons"),
        (TEXT.replace(",", "\t"), "{table}: expected columns separated by commas, received tabs"),
        (TEXT + "a/1.png,dog\n", "{table}: expected each image once, received 'a/1.png' in line 2 and line 6"),
        (TEXT + "./a/../a/1.png,dog\n", "{table}: expected each image once, received 'a/1.png' in line 2 and line 6"),
        (TEXT + "c.png\n", "{table}: line 6: expected 2 cells, received 1"),
        (TEXT + 'c.png,"dog\n', "{table}: line 6: expected CSV, received: unexpected end of data"),
        (TEXT + "c.png," + "x" * 200_000, "{table}: line 6: expected CSV, received: field larger than field limit"),
        (TEXT.encode() + b"caf\xe9.png,dog\n", "{table}: expected text in UTF-8, received byte 0xe9"),
        (TEXT.encode("utf-16"), "{table}: expected text in UTF-8, received byte 0xff"),
        ("", "data.columns.image: expected one column 'image' in {table}, received no header"),
        ("image,label\n", "{table}: expected at least one row, received none"),
        (
            "image,label,image\n",
            "data.columns.image: expected one column 'image' in {table}, received 'image', 'label'",
        ),
        ("a/1.png,cat\n", "data.columns.image: expected one column 'image' in {table}, received 'a/1.png', 'cat'"),
        (TEXT + ",dog\n", "data.columns.image: line 6: expected the path of a file, received ''"),
        (TEXT + "http://x.org/1.png,dog\n", "data.columns.image: line 6: expected the path of a file, received 'http:"),
        (TEXT + "a\\3.png,dog\n", "data.columns.image: line 6: expected forward slashes, received 'a\\\\3.png'"),
        (TEXT + "c.png,Dog \n", "the classes"),
    ],
)
def test_table_with_a_mistake_is_refused(text: str | bytes, message: str, tmp_path: Path, capsys: Any) -> None:
    table = write(tmp_path, text)
    if message == "the classes":  # no mistake, but it is told
        assert opened(table).class_names == ["Dog", "cat", "dog"]
        assert capsys.readouterr().out == "prepare: the classes 'Dog' and 'dog' differ only in their spelling\n"
    else:
        assert refused(table).startswith(message.format(table=table))


def test_table_with_files_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    long = "x" * 300 + ".png"
    source = opened(write(tmp_path, TEXT + f"c/1.png,dog\na,cat\n{long},dog\na/1.png/2.png,cat\n"))
    assert {example.name: example.unreadable for example in source.examples("train")} == {
        **dict.fromkeys(dict(ROWS), ""),
        "c/1.png": "it is missing",
        "a": "it is a folder",
        long: "File name too long",
        "a/1.png/2.png": "Not a directory",
    }


def test_table_that_is_missing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"data.name: expected a CSV or Parquet file, received '{tmp_path}'"
    expected = "data.name: expected a table named *.csv or *.parquet, received 'table.xlsx'"
    assert refused(write(tmp_path, TEXT, "table.xlsx")) == expected


@pytest.mark.parametrize("path", ["{root}/a/1.png", "../out.png", "a/../../out.png"])
def test_table_with_paths_out_of_its_folder_needs_follow(path: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    (tmp_path / "out.png").write_bytes(b"out")
    table = write(root, "")
    write(root, TEXT.replace("a/1.png", path.format(root=root)))
    for links in ("within", "refuse"):
        message = refused(table, links=links)
        assert message.startswith(
            f"data.links: line 2: expected paths below the table's folder with {links}, received "
        )
        assert message.endswith("`follow` reads it")
    images = [example.image for example in opened(table, links="follow").examples("train")]
    assert sorted(images)[-1] in (b"out", b"b/2.png")
    assert all(images)


@pytest.mark.parametrize(
    ("link", "target", "links", "write_links"),
    [
        ("a/1.png", "out.png", "within", "follow"),
        ("a", "out", "within", "follow"),
        ("a/1.png", "in/.store/1.png", "refuse", "within"),
        ("a", "in/.store", "refuse", "within"),
    ],
)
def test_table_with_links_that_are_not_allowed_says_what_to_write(
    link: str, target: str, links: str, write_links: str, tmp_path: Path
) -> None:
    root = tmp_path / "in"
    table = write(root, TEXT)
    for path in ("out.png", "out/1.png", "out/2.png", "in/.store/1.png", "in/.store/2.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"out")
    (root / link).rename(tmp_path / "away")
    (root / link).symlink_to(tmp_path / target)
    message = refused(table, links=links)
    assert message.startswith("data.links: expected ")
    assert message.endswith(f"received 'line 2: a/1.png'; write data.links: {write_links} to read it")
    assert all(example.image for example in opened(table, links=write_links).examples("train"))


@pytest.mark.parametrize(
    ("again", "links"),
    [("{root}/a/1.png", "follow"), ("../in/a/1.png", "follow"), ("link.png", "within"), ("folder/1.png", "within")],
)
def test_table_with_one_file_in_two_rows_is_refused_however_it_is_reached(
    again: str, links: str, tmp_path: Path
) -> None:
    root = tmp_path / "in"
    table = write(root, TEXT + f"{again},dog\n".format(root=root))
    (root / "link.png").symlink_to(root / "a" / "1.png")
    (root / "folder").symlink_to("a")
    name = again.format(root=root)
    assert refused(table, links=links) == f"{table}: expected each image once, received {name!r} in line 2 and line 6"


def test_table_that_is_a_link_has_its_paths_beside_the_link(tmp_path: Path) -> None:
    table = write(tmp_path, TEXT)
    table.rename(tmp_path.with_name("away.csv"))
    table.symlink_to(tmp_path.with_name("away.csv"))
    assert all(example.image for example in opened(table).examples("train"))


def test_table_of_whole_numbers_is_in_numeric_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT.replace("cat", "10").replace("dog", "9")
    assert opened(write(tmp_path, text)).class_names == ["9", "10"]
    assert capsys.readouterr().out == "prepare: the classes are in numeric order: 9, 10, ...\n"
    assert opened(write(tmp_path, text.replace(",9", ",9.5"))).class_names == ["10", "9.5"]
    message = refused(write(tmp_path, text), class_names=["10", "9"])
    assert message.startswith("data.class_names: expected new names in the order of the classes 9, 10, received '10'")


def test_table_of_parquet_gives_the_rows_of_csv(tmp_path: Path) -> None:
    images, labels = zip(*ROWS, strict=True)
    source = opened(write_parquet(tmp_path, {"label": labels, "image": images, "group": [[1]] * 4}))
    assert classes(source) == dict(ROWS)
    assert source.version == opened(write(tmp_path, TEXT)).version


def write_labels(folder: Path, labels: list[Any]) -> Path:
    """A table with these labels: CSV with them as text, Parquet with any."""
    images = [image for image, _ in ROWS]
    if all(isinstance(label, str) for label in labels):
        return write(folder, "image,label\n" + "".join(map("{},{}\n".format, images, labels)))
    return write_parquet(folder, {"image": images, "label": labels})


NAN = float("nan")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, 10, 3, None], ["3", "10"]),
        ([3.0, 10.0, 3.0, NAN], ["3", "10"]),
        (["3.0", "10.0", "3", ""], ["3", "10"]),  # as a CSV file has them, if the writer made them floats for the gap
        ([0.0, -0.0, 2.5, None], ["0", "2.5"]),
        (["0.0", "0", "2.5", ""], ["0", "2.5"]),
        ([True, False, True, None], ["False", "True"]),
        (["True", "False", "True", ""], ["False", "True"]),
    ],
)
def test_table_with_numbers_or_truth_values_reads_them_as_classes_alike(
    labels: list[Any], classes: list[str], tmp_path: Path
) -> None:
    source = opened(write_labels(tmp_path, labels), HALVES | {"predict": "predict"})
    assert source.class_names == classes
    assert len(source.labels("predict")) == 1


@pytest.mark.parametrize("labels", [["01", "1", "2", "1"], ["True", "true", "x", "x"], ["0.5", "0.50", "a", "a"]])
def test_table_with_one_number_in_two_spellings_is_refused(labels: list[str], tmp_path: Path) -> None:
    message = refused(write_labels(tmp_path, labels))
    assert message == (
        f"data.name: expected one spelling of each class, received {labels[0]!r} and {labels[1]!r} in train"
    )


@pytest.mark.parametrize("word", ["nan", "NaN", "<NA>", "NaT", "inf"])
def test_table_with_a_word_for_a_missing_label_is_refused(word: str, tmp_path: Path) -> None:
    table = write_labels(tmp_path, ["cat", "dog", word, "dog"])
    assert refused(table) == (
        f"{table}: line 4: expected a label, or an empty one where it is not known, received {word!r}"
    )


def test_table_with_a_class_that_may_stand_for_a_missing_label_says_so(tmp_path: Path, capsys: Any) -> None:
    assert opened(write_labels(tmp_path, ["None", "glioma"] * 2)).class_names == ["None", "glioma"]
    expected = "prepare: 'None' is a class; a row whose class is not known has an empty label\n"
    assert capsys.readouterr().out == expected


def test_table_of_parquet_with_dictionaries_reads_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    images, labels = zip(*ROWS, strict=True)
    table = write_parquet(tmp_path, {"image": images, "label": pyarrow.array(labels).dictionary_encode()})
    assert classes(opened(table)) == dict(ROWS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [b"x"], "label": ["cat"]},
            "row 1: expected text in the column of image, received a value of type bytes",
        ),
        (
            {"image": [{"bytes": b"x"}], "label": ["cat"]},
            "row 1: expected text in the column of image, received a value of type dict",
        ),
        (
            {"image": ["x"], "label": [["cat"]]},
            "row 1: expected text in the column of label, received a value of type list",
        ),
    ],
)
def test_table_of_parquet_with_other_types_is_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refused(write_parquet(tmp_path, columns)).endswith(message)


def test_table_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", exc_type=ImportError)
    message = refused(write(tmp_path, TEXT, "table.parquet"))
    assert message.startswith(f"{tmp_path}/table.parquet: expected Parquet, received: ")


def test_table_of_parquet_without_pyarrow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    message = refused(write(tmp_path, b"", "table.parquet"))
    assert message.startswith("data.name: expected pyarrow, which reads Parquet, received: ")
