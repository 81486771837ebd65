"""Folders: which files are examples, how the others are counted, and which layouts are refused."""

from __future__ import annotations

import os
import tracemalloc
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pictures import encode, picture, write_picture
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data.sources import open_source
from flatmin.data.sources.base import Source

HALVES = {"train": "train[:50%]", "test": "train[50%:]"}
GIVEN = {"train": "train", "test": "test"}
CLASSES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


def put(root: Path, files: Iterable[str]) -> Path:
    """Make files, whose bytes no source looks at before they are read."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"bytes")
    return root


def opened(root: Path, splits: dict[str, str] | None = HALVES, **changes: Any) -> Source:
    carved = {"val_fraction": 0.1} if splits and "val" not in splits else {}
    values = {"source": "folder", "name": str(root), "splits": splits, **carved, **changes}
    return open_source(Data.model_validate(values))


def refused(root: Path, splits: dict[str, str] | None = HALVES, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        opened(root, splits, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(source: Source, expression: str = "train") -> set[str]:
    return {example.name for example in source.examples(expression)}


# Every file is an example or counted


def test_folder_counts_every_other_file_and_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, CLASSES)
    put(tmp_path, [f"horse/{index}.HEIC" for index in range(20)])
    put(tmp_path, ["readme.md", "cat/notes.txt", "cat/a.jpg_large", "cat/model.e-1", "dog/LICENSE", "dog/a.b c d"])
    put(tmp_path, ["cat/Thumbs.db", "cat/.DS_Store", "cat/.3.png", "__MACOSX/cat/._1.png", "dog/@eaDir/1.png/x.jpg"])
    put(tmp_path, [".git/objects/ab/cd", "dog/.ipynb_checkpoints/1.png", "dog/desktop.ini"])
    os.mkfifo(tmp_path / "dog" / "3.png")
    (tmp_path / "eel").mkdir()
    source = opened(tmp_path)
    assert {example.name: source.class_names[example.label] for example in source.examples("train")} == {
        file: file.partition("/")[0] for file in CLASSES
    }
    assert source.ignored == {
        "hidden": {"db": 1, "none": 2, "png": 3, "jpg": 1, "ini": 1},
        "no_file": {"png": 1},
        "suffix": {"heic": 20, "md": 1, "txt": 1, "jpg_large": 1, "none": 1, "e-1": 1, "other": 1},
    }
    assert source.empty == ["eel", "horse"]
    assert capsys.readouterr().out == (
        "prepare: 35 files were not read: 20 .heic, 1 .e-1, 1 .jpg_large, 1 .md, 1 without a suffix, 1 of odd suffixes,"
        " 1 .txt; 8 hidden or system; 1 no file; folders without images: eel, horse\n"
    )


def test_folder_of_pictures_alone_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = opened(put(tmp_path, CLASSES))
    assert (source.ignored, source.empty) == ({}, [])
    assert capsys.readouterr().out == ""


def test_folder_of_many_suffixes_lists_the_commonest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, CLASSES)
    put(tmp_path, [f"cat/x.s{index}" for index in range(30)] + ["cat/a.txt", "cat/b.txt"])
    assert sum(opened(tmp_path).ignored["suffix"].values()) == 32
    said = capsys.readouterr().out
    assert said.startswith("prepare: 32 files were not read: 2 .txt, 1 .s0, ")
    assert said.endswith(", 21 of other suffixes\n")


def test_folder_of_splits_names_empty_splits_and_classes(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("train", "test") for file in CLASSES])
    put(tmp_path, ["train/horse/1.heic", "val/cat/1.heic", "notes/a.txt"])
    assert opened(tmp_path, GIVEN).empty == ["notes", "train/horse", "val"]


@pytest.mark.parametrize("suffix", ["avif", "JPG", "jp2", "tga", "pcx", "webp", "qoi", "ico", "png "])
def test_folder_reads_what_pillow_reads(suffix: str, tmp_path: Path) -> None:
    put(tmp_path, [*CLASSES, f"cat/3.{suffix}"])
    assert f"cat/3.{suffix}" in names(opened(tmp_path))


@pytest.mark.parametrize("suffix", ["eps", "ps", "wmf", "emf", "pdf", "mpg", "h5", "grib", "heic", "nef", "svg"])
def test_folder_counts_what_pillow_cannot_read_by_itself(suffix: str, tmp_path: Path) -> None:
    put(tmp_path, [*CLASSES, f"cat/3.{suffix}"])
    source = opened(tmp_path)
    assert len(names(source)) == 4
    assert source.ignored == {"suffix": {suffix: 1}}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000"])
def test_folder_without_suffix_is_known_by_its_first_bytes(kind: str, tmp_path: Path) -> None:
    put(tmp_path, [*CLASSES, "cat/BMW is no picture"])
    (tmp_path / "cat" / "0f3a").write_bytes(encode(picture(), kind))
    (tmp_path / "dog" / "photo.").write_bytes(encode(picture(), kind))
    source = opened(tmp_path)
    assert names(source) == {*CLASSES, "cat/0f3a", "dog/photo."}
    assert source.ignored == {"suffix": {"none": 1}}


def test_folder_with_a_registered_plugin_reads_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatmin import images

    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    for function in (images.formats, images.suffixes):
        function.cache_clear()
    try:
        assert "cat/3.heic" in names(opened(put(tmp_path, [*CLASSES, "cat/3.heic"])))
    finally:
        for function in (images.formats, images.suffixes):
            function.cache_clear()


def test_folder_of_many_files_takes_little_memory(tmp_path: Path) -> None:
    for class_name in ("cat", "dog"):
        (tmp_path / class_name).mkdir()
        for index in range(2000):
            (tmp_path / class_name / f"{index:05d}.png").touch()
    tracemalloc.start()
    try:
        source = opened(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source.labels("train")) == 4_000
    assert peak < 4_000 * 1_000  # a kilobyte a file: 100 MB for 100,000


# Names and folders that are hard to read


def test_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    put(tmp_path, CLASSES)
    here = os.open(tmp_path / "cat", os.O_RDONLY)
    for _ in range(25):  # a path that is longer than the system takes
        os.mkdir("d" * 200, dir_fd=here)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    message = refused(tmp_path)
    assert message.startswith("data.name: expected folders that can be read, received ")
    assert message.endswith("...': File name too long")
    assert len(message) < 400


def test_folder_with_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    put(tmp_path, CLASSES)
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.txt")).touch()
    assert opened(tmp_path).ignored == {"suffix": {"txt": 1}}
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.png")).touch()
    assert refused(tmp_path).startswith("data.name: expected names in UTF-8, received ")


def test_folder_with_odd_names_reads_them(tmp_path: Path) -> None:
    odd = {"cat/a\nb.png", 'cat/"quoted", 100%.png', "cat/тест 写真.png", "cat/-rf.png", "cat/$(x)`y`.png"}
    assert names(opened(put(tmp_path, [*CLASSES, *odd]))) == {*CLASSES, *odd}


# Links


def linked(root: Path, link: str, target: str) -> Path:
    put(root, [*(f"in/{file}" for file in CLASSES), "in/.store/3.png", "out/3.png"])
    (root / "in" / link).symlink_to(root / target)
    return root / "in"


@pytest.mark.parametrize(
    ("link", "target", "links", "write"),
    [
        ("cat/3.png", "out/3.png", "within", "follow"),
        ("cat/3.png", "out/missing.png", "within", "follow"),
        ("eel", "out", "within", "follow"),
        ("eel", "in/.store", "within", "follow"),
        ("cat/up", "in", "within", "follow"),
        ("cat/up", "in", "refuse", "follow"),
        ("cat/3.png", "in/.store/3.png", "refuse", "within"),
        ("cat/3.png", "out/3.png", "refuse", "follow"),
        ("eel", "in/.store", "refuse", "follow"),
    ],
)
def test_folder_with_a_link_that_is_not_allowed_says_what_to_write(
    link: str, target: str, links: str, write: str, tmp_path: Path
) -> None:
    root = linked(tmp_path, link, target)
    message = refused(root, links=links)
    assert message.startswith("data.links: expected ")
    assert message.endswith(f"received '{root}/{link}'; write data.links: {write} to read it")
    assert len(names(opened(root, links=write))) > (3 if link == "cat/up" else 4)


@pytest.mark.parametrize(
    ("links", "other", "values"),
    [
        ({"dog/3.png": "1.png"}, "dog/3.png", {}),
        ({"dog/3.png": "{root}/dog/1.png"}, "dog/3.png", {"links": "follow"}),
        ({"eel": "dog"}, "eel/1.png", {"links": "follow"}),
        ({"dog/0.png": "{out}", "eel/0.png": "../../out.png"}, "eel/0.png", {"links": "follow"}),
    ],
)
def test_folder_with_one_file_twice_in_a_split_is_refused(
    links: dict[str, str], other: str, values: dict[str, Any], tmp_path: Path
) -> None:
    root = put(tmp_path / "in", [*CLASSES, "../out.png"])
    for link, target in links.items():
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(target.format(root=root, out=tmp_path / "out.png"))
    first = next(iter(links)) if len(links) > 1 else "dog/1.png"
    assert refused(root, **values) == (
        f"data.name: expected each image of a split once, received {first!r} and {other!r}, which are one file"
    )


def test_folder_with_links_into_a_split_that_is_set_aside_is_read(tmp_path: Path) -> None:
    put(tmp_path, [f"files/{file}" for file in CLASSES])
    for split, number in (("train", 1), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").symlink_to(f"../../files/{name}/{number}.png")
    source = opened(tmp_path, {**GIVEN, "unused": "files"})
    assert {example.name: example.image for example in source.examples("test")} == {
        f"test/{name}/0.png": b"bytes" for name in ("cat", "dog")
    }


def test_folder_with_a_loop_of_links_ends_and_counts_it(tmp_path: Path) -> None:
    root = put(tmp_path, [f"train/{file}" for file in CLASSES])
    (root / "train" / "cat" / "up").symlink_to(root)
    (root / "train" / "dog" / "here").symlink_to(".")
    # Two folders outside that link to each other, and are read once from each way into them.
    put(tmp_path.with_name("out"), ["a/3.png", "b/4.png"])
    (tmp_path.with_name("out") / "a" / "b").symlink_to("../b")
    (tmp_path.with_name("out") / "b" / "a").symlink_to("../a")
    (root / "train" / "eel").symlink_to(tmp_path.with_name("out") / "a")
    source = opened(root, links="follow")
    assert names(source) == {f"train/{file}" for file in (*CLASSES, "eel/3.png", "eel/b/4.png")}
    assert source.ignored == {"loop": {"none": 3}}


def test_folder_with_files_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    put(tmp_path, [*CLASSES, "dog/vanished.png", "dog/replaced.png"])
    for link in ("self.png", "self.txt"):
        (tmp_path / "cat" / link).symlink_to(link)
    (tmp_path / "cat" / "away.png").symlink_to("nowhere.png")
    source = opened(tmp_path)
    for file in ("vanished.png", "replaced.png"):
        (tmp_path / "dog" / file).unlink()
    os.mkfifo(tmp_path / "dog" / "replaced.png")
    assert {example.name: example.unreadable for example in source.examples("train")} == {
        **dict.fromkeys(CLASSES, ""),
        "cat/self.png": "Too many levels of symbolic links",
        "cat/away.png": "it is a link to a missing file",
        "dog/vanished.png": "it is missing",
        "dog/replaced.png": "it is no file",
    }


@pytest.mark.parametrize("cache", ["files/md5", ".dvc/cache"])
def test_folder_of_links_into_dvcs_cache_is_read(cache: str, tmp_path: Path) -> None:
    put(tmp_path, CLASSES)
    target = tmp_path.with_name("cache") / cache / "0a" / ("b" * 30)
    put(target.parent, [target.name])
    for link in ("cat/3.png", "dog/3.png"):  # there equal files are one
        (tmp_path / link).symlink_to(target)
    assert {"cat/3.png", "dog/3.png"} < names(opened(tmp_path))
    assert "write data.links: follow" not in refused(tmp_path, links="refuse")


# Layouts


def test_folder_version_depends_on_the_files_only(tmp_path: Path) -> None:
    version = opened(put(tmp_path, CLASSES)).version
    assert opened(tmp_path, seed=1).version == version
    (tmp_path / CLASSES[0]).write_bytes(b"more bytes")
    changed = opened(tmp_path).version
    assert len({version, changed, opened(put(tmp_path, ["cat/3.png"])).version}) == 3


def test_folder_of_splits_may_have_unlabelled_ones(tmp_path: Path) -> None:
    put(tmp_path, ["train/cat/1.png", "train/dog/deep/er/2.png", "test/dog/3.png", "new/2.png", "new/1.png"])
    source = opened(tmp_path, {**GIVEN, "predict": "new"})
    assert source.class_names == ["cat", "dog"]
    assert set(source.splits) == {"train", "test", "new"}
    found = {split: [(each.name, each.label) for each in source.examples(split)] for split in source.splits}
    assert found["test"] == [("test/dog/3.png", 1)]
    assert dict(found["train"]) == {"train/cat/1.png": 0, "train/dog/deep/er/2.png": 1}
    assert found["new"] == [("new/1.png", -1), ("new/2.png", -1)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "expected a folder of images for each class, received no images in"),
        (["1.png"], "expected a folder of images for each class, received '1.png' outside any class folder (1 of 1"),
        (
            ["train/cat/1.png", "train/2.png"],
            "expected all or none of the images of 'train' in class folders, received 'train/2.png' outside one",
        ),
        (["cat/1.png"], "expected at least two classes, received 1: 'cat'"),
        (["cat /1.png", "cat/1.png", "dog/1.png"], "expected one spelling of each class, received 'cat' and 'cat ' in"),
        (["\ufeffcat/1.png", "cat/1.png", "dog/1.png"], "expected one spelling of each class, received 'cat' and"),
    ],
)
def test_folder_without_classes_is_refused(files: list[str], message: str, tmp_path: Path) -> None:
    assert refused(put(tmp_path, files)).startswith(f"data.name: {message}")


def test_folder_that_is_missing_is_refused() -> None:
    assert refused(Path("no/such")) == "data.name: expected a folder, received 'no/such'"


def test_folder_of_splits_with_the_usual_names_needs_no_splits(tmp_path: Path) -> None:
    for split in ("Train", "validation", "testing", "predict"):
        put(tmp_path, [f"{split}/{file}" for file in CLASSES])
    source = opened(tmp_path, None)
    expected = {"train": "Train", "val": "validation", "test": "testing", "predict": "predict"}
    assert source.expressions == expected
    assert list(source.expressions) == list(expected)
    assert sorted(source.labels("Train")) == [0, 0, 1, 1]


def test_folder_without_val_takes_it_from_train_where_that_is_asked(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("train", "test") for file in CLASSES])
    assert opened(tmp_path, None, val_per_class=1).expressions == GIVEN
    put(tmp_path, ["val/cat/1.png"])
    assert "without data.val_fraction" in refused(tmp_path, None, val_per_class=1)


@pytest.mark.parametrize(
    ("splits", "found", "write"),
    [
        ([""], "train (4)", 'data.splits: {train: "train[:80%]", test: "train[80%:]"}, data.val_fraction: 0.1'),
        (["train"], "train (4)", 'data.splits: {train: "train[:80%]", test: "train[80%:]"}, data.val_fraction: 0.1'),
        (["train", "test"], "test (4), train (4)", "data.splits: {train: train, test: test}, data.val_fraction: 0.1"),
        (
            ["train", "val"],
            "train (4), val (4)",
            'data.splits: {train: "train[:80%]", val: val, test: "train[80%:]"}',
        ),
        (["val", "one", "two"], "one (4), two (4), val (4)", "data.splits: {train: ..., val: ..., test: ...} with"),
    ],
)
def test_folder_without_the_usual_splits_says_what_to_write(
    splits: list[str], found: str, write: str, tmp_path: Path
) -> None:
    put(tmp_path, [f"{split}/{file}" if split else file for split in splits for file in CLASSES])
    message = refused(tmp_path, None)
    expected = "data.splits: expected splits named train, val, test where it is left out"
    assert message.startswith(f"{expected}, found {found}; write {write}")


def test_folder_with_a_split_named_all_is_refused(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("all", "test") for file in CLASSES])
    expected = "data.name: expected no split named 'all', which stands for all of them"
    assert refused(tmp_path, {"train": "all", "test": "test"}) == expected


def test_folder_with_two_splits_for_a_role_is_refused_without_splits(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("train", "val", "valid", "test") for file in CLASSES])
    assert refused(tmp_path, None).startswith("data.splits: expected one split for val, found 'val' and 'valid'")


@pytest.mark.parametrize(
    "files",
    [
        ["train/1.png", "test/1.png"],
        ["Train/1.png", "validation/1.png", "cat/1.png"],
        ["train/1.png"],
        ["training/1.png", "testing/1.png", "sample/1.png"],
        ["cat/1.png", "dog/1.png", "predict/1.png"],
        ["cat/1.png", "dog/1.png", "Test/1.png"],
        ["train/train/1.png", "test/test/1.png"],
        ["train2017/1.png", "val2017/1.png", "annotations/a.json"],
        ["train_images/1.png", "test_images/1.png"],
        ["training set/1.png", "test1/1.png"],
        ["train/train/cat/1.png", "train/val/cat/1.png"],
    ],
)
def test_folder_of_splits_without_classes_is_refused(files: list[str], tmp_path: Path) -> None:
    message = refused(put(tmp_path, files), GIVEN)
    assert message.startswith("data.name: expected classes, received ")
    assert "names of splits" in message
    assert "data.source: table" in message


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["images/1.png", "labels/1.txt"], "images, labels in '{root}/'"),
        (["images/1.png", "masks/1.png"], "images, masks in '{root}/'"),
        (["images/train/1.png", "images/val/2.png", "labels/train/1.txt"], "images, labels in '{root}/'"),
        (["images/train/1.png", "masks/train/1.png"], "images, masks in '{root}/'"),
        (
            ["train/images/1.png", "train/labels/1.txt", "test/images/2.png", "test/labels/2.txt"],
            "images, labels in '{root}/t",
        ),
        (["train/Image/1.png", "train/Mask/1.png", "test/Image/2.png", "test/Mask/2.png"], "Image, Mask in '{root}/t"),
        (
            ["JPEGImages/1.jpg", "SegmentationClass/1.png", "Annotations/1.xml"],
            "Annotations, JPEGImages, SegmentationClass in '{root}/'",
        ),
    ],
)
@pytest.mark.parametrize("splits", [{"train": "train", "test": "train"}, None])
def test_folder_of_pictures_and_their_annotations_is_refused(
    files: list[str], found: str, splits: dict[str, str] | None, tmp_path: Path
) -> None:
    message = refused(put(tmp_path, files), splits)
    expected = f"data.name: expected a folder of images for each class, received {found.format(root=tmp_path)}"
    assert message.startswith(expected)
    assert "', as data for detection or segmentation have them; list the images with one label each in" in message


@pytest.mark.parametrize("classes", [["mask", "no mask"], ["image", "text"]])
def test_folder_with_classes_of_such_names_is_read(classes: list[str], tmp_path: Path) -> None:
    assert opened(put(tmp_path, [f"{name}/1.png" for name in classes])).class_names == classes


def test_folder_of_annotations_that_are_set_aside_is_read(tmp_path: Path) -> None:
    put(tmp_path, [f"{top}/{file}" for top in ("images", "masks") for file in CLASSES])
    splits = {"train": "images[:50%]", "test": "images[50%:]"}
    assert opened(tmp_path, splits | {"unused": "masks"}).class_names == ["cat", "dog"]
    assert "expected a role for each split, received masks (4) unused" in refused(tmp_path, splits)


def test_folder_with_a_copy_of_itself_inside_can_set_it_aside(tmp_path: Path) -> None:
    put(tmp_path, [f"{top}{split}/{file}" for top in ("", "pets/") for split in ("train", "test") for file in CLASSES])
    for splits in (GIVEN, None):
        assert refused(tmp_path, splits, val_fraction=0.1) == (
            "data.splits: expected a role for each split, received pets (8) unused; write data.splits.unused: pets"
        )
    for role in ("unused", "predict"):
        assert opened(tmp_path, {**GIVEN, role: "pets"}).class_names == ["cat", "dog"]
    message = refused(tmp_path, {"train": "train+pets", "test": "test"})
    assert f"received test, train in {tmp_path}/pets, which are names of splits" in message
    assert message.endswith("; if pets is not needed, name it in data.splits.unused, or move it away")


def test_folder_of_splits_with_spaces_and_dots_reads_them(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("my train", "v1.test") for file in CLASSES])
    splits = {"train": "my train[:50%]+v1.test[3:]", "val": "my train[50%:]", "test": "v1.test[:3]"}
    source = opened(tmp_path, splits)
    assert {name.partition("/")[0] for name in names(source, splits["train"])} == {"my train", "v1.test"}
    assert [len(names(source, expression)) for expression in splits.values()] == [3, 2, 3]
    assert names(source, splits["test"]) | names(source, "v1.test[3:]") == names(source, "v1.test")
    assert len(names(source, "all")) == 8


@pytest.mark.parametrize("classes", [["bus", "car", "train"], ["invalid", "valid"]])
def test_folder_with_a_class_that_only_sounds_like_a_split_is_read(classes: list[str], tmp_path: Path) -> None:
    assert opened(put(tmp_path, [f"{name}/1.png" for name in classes])).class_names == classes


@pytest.mark.parametrize("train", ["train", "nope+Train", "Train[:x]", "all[:50%]"])
def test_folder_without_a_split_that_is_named_lists_those_there_are(train: str, tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("Train", "Test") for file in CLASSES])
    message = refused(tmp_path, {"train": train, "test": "Test"})
    assert message.startswith(f"data.splits.train: expected slices of Test (4), Train (4), received {train!r}: ")


@pytest.mark.parametrize("splits", [HALVES, None])
@pytest.mark.parametrize("files", [["cat/2019/1.png", "dog/2020/1.png"], ["cat/1.png", "cat/2019/1.png", "dog/1.png"]])
def test_folder_of_classes_with_folders_in_them_is_refused(
    files: list[str], splits: dict[str, str] | None, tmp_path: Path
) -> None:
    message = refused(put(tmp_path, files), splits)
    assert message.startswith(
        "data.name: expected CLASS/image or SPLIT/CLASS/image, received 'cat/2019/1.png' in cat, dog"
    )
    assert "move them into a folder train/" in message


def test_folder_whose_classes_would_be_years_is_refused(tmp_path: Path) -> None:
    files = [f"{split}/{year}/{name}/1.png" for split in ("train", "test") for year in (2019, 2020) for name in "ab"]
    message = refused(put(tmp_path, files), GIVEN)
    assert message.startswith("data.name: expected SPLIT/CLASS/image, received '")
    assert message.endswith("whose classes would be 2019, 2020: put the folders of years below those of classes")


def test_folder_with_empty_folder_of_odd_name_tells_it_as_text(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(put(tmp_path, CLASSES)) + b"/\xff")
    assert opened(tmp_path).empty == ["\\xff"]


@pytest.mark.parametrize("splits", [HALVES, GIVEN, None])
@pytest.mark.parametrize("inner", ["cat/1.png", "train/cat/1.png", "train/1.png"])
def test_folder_that_lies_deeper_is_refused(inner: str, splits: dict[str, str] | None, tmp_path: Path) -> None:
    message = refused(put(tmp_path, [f"pets/{inner}", "notes/a.txt"]), splits)
    assert message.endswith(f"; write data.name: {tmp_path}/pets")


def test_folder_of_numbered_splits_is_read_where_they_are_named(tmp_path: Path) -> None:
    put(tmp_path, [f"fold{number}/{file}" for number in range(1, 5) for file in CLASSES])
    splits = {"train": "fold1+fold2", "val": "fold3", "test": "fold4[:50%]"}
    assert len(names(opened(tmp_path, splits), "fold1+fold2")) == 8
    assert "the names of the splits in data.splits" in refused(tmp_path, None)


def test_folder_with_a_split_that_no_role_names_is_refused(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("train", "val", "test", "extra") for file in CLASSES])
    message = refused(tmp_path)
    assert message == (
        "data.splits: expected a role for each split, received extra (4), test (4), val (4) unused; write data.splits:"
        " {train: train, val: val, test: test} without data.val_fraction or val_per_class, or"
        " data.splits.unused: extra+test+val"
    )
    roles = {"train": "train", "val": "val", "test": "test"}
    assert "received extra (4) unused" in refused(tmp_path, roles)
    assert opened(tmp_path, roles | {"unused": "extra"}).class_names == ["cat", "dog"]
    assert opened(tmp_path, roles | {"predict": "extra[:50%]"}).class_names == ["cat", "dog"]
    assert refused(tmp_path, roles | {"unused": "extras"}).startswith("data.splits.unused: expected splits among extra")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("cat", "Cat"),
        (unicodedata.normalize("NFC", "kätzchen"), unicodedata.normalize("NFD", "kätzchen")),
        ("cat", "cat "),
        ("great_dane", "great dane"),
        ("cat", "cat\u00a0"),
        ("cat", "cat\u200b"),
        ("1", "\uff11"),
    ],
)
def test_folder_with_a_class_in_two_spellings_is_refused(train: str, test: str, tmp_path: Path) -> None:
    put(tmp_path, ["train/eel/1.png", f"train/{train}/1.png", "test/eel/1.png", f"test/{test}/1.png"])
    message = refused(tmp_path, GIVEN)
    assert message.startswith("data.name: expected one spelling of each class, received ")
    assert ascii(train) in message
    assert ascii(test) in message
    assert message.endswith("in test, train")


@pytest.mark.parametrize(
    "pair", [("0", "0.0"), ("1", "01"), ("-0", "0"), ("True", "true"), ("1.5", "1.50"), ("+1", "1")]
)
def test_folder_with_one_number_or_truth_value_as_two_classes_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    message = refused(put(tmp_path, [f"{name}/1.png" for name in (*pair, "x")]))
    assert message == (
        f"data.name: expected one spelling of each class, received {min(pair)!r} and {max(pair)!r} in train"
    )


def test_folder_of_upper_and_lower_case_classes_is_read_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened(put(tmp_path, ["a/1.png", "A/1.png"])).class_names == ["A", "a"]
    assert capsys.readouterr().out == "prepare: the classes 'A' and 'a' differ only in their spelling\n"


@pytest.mark.parametrize("role", ["val", "test"])
def test_folder_with_a_class_that_train_lacks_is_refused(role: str, tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("train", "val", "test") for file in CLASSES])
    put(tmp_path, [f"{role}/eel/1.png"])
    assert refused(tmp_path, None) == (
        f"data.splits.train: expected images of each class, received none of 'eel', which {role} has"
        " (1 of 3 classes are missing)"
    )


def test_folder_with_classes_in_predict_alone_ignores_them(tmp_path: Path) -> None:
    put(tmp_path, [f"{split}/{file}" for split in ("train", "val", "test") for file in CLASSES])
    put(tmp_path, ["predict/unknown/1.png", "predict/2.png", "predict/cat/3.png"])
    source = opened(tmp_path, None)
    assert source.class_names == ["cat", "dog"]
    assert set(source.labels("predict")) == {-1}
    assert names(source, "predict") == {"predict/unknown/1.png", "predict/2.png", "predict/cat/3.png"}


def test_folder_of_numbers_is_in_numeric_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = opened(put(tmp_path, [f"{number}/1.png" for number in (1, 2, 10, 9)]))
    assert source.class_names == ["1", "2", "9", "10"]
    assert {example.label: example.name for example in source.examples("train")}[3] == "10/1.png"
    assert capsys.readouterr().out == "prepare: the classes are in numeric order: 1, 2, 9, ...\n"
    assert opened(put(tmp_path, ["x/1.png"])).class_names == ["1", "10", "2", "9", "x"]


@pytest.mark.parametrize("given", [["dog", "cat"], ["Dog", "Katze"], ["Hund", "cat"]])
def test_folder_with_class_names_in_another_order_is_refused(given: list[str], tmp_path: Path) -> None:
    message = refused(put(tmp_path, CLASSES), class_names=given)
    assert message.startswith("data.class_names: expected new names in the order of the classes cat, dog, received ")
    assert refused(tmp_path, class_names=[*given, "eel"]) == "data.class_names: expected 2 names, received 3"


@pytest.mark.parametrize("given", [["cat", "dog"], ["Cat", "Hund"], ["Katze", "Hund"]])
def test_folder_with_class_names_takes_them(given: list[str], tmp_path: Path) -> None:
    source = opened(put(tmp_path, CLASSES), class_names=given)
    assert source.class_names == given
    assert {example.name[:3] for example in source.examples("train") if example.label == 0} == {"cat"}


def test_folder_gives_the_bytes_of_its_files(tmp_path: Path) -> None:
    write_picture(tmp_path / "cat" / "1.png")
    put(tmp_path, ["dog/1.png"])
    images = {example.name: example.image for example in opened(tmp_path).examples("train")}
    assert images == {"cat/1.png": (tmp_path / "cat" / "1.png").read_bytes(), "dog/1.png": b"bytes"}
