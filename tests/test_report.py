"""The report of a made-up study."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from fixtures import tiny_params
from reports import Made

from flatmin.audit import audit
from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.params import Augment, EarlyStopping
from flatmin.evaluation import gallery
from flatmin.report import page, words
from flatmin.report.study import REQUIRED, changed_params

NAMES = ["cat", "dog", "<b>cow</b> & $x^2$"]


class Page(HTMLParser):
    """A page's elements and text.

    Attributes:
        tags: the name and the attributes of each element, in order.
        text: all text between them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def write(made: Made) -> Page:
    page.write(made.study(), made.folder / "report.html")
    return Page(made.folder / "report.html")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a study with three seeds and labels."""
    return write(Made(tmp_path_factory.mktemp("made"), names=NAMES, duplicates=8))


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a study with one seed, without duplicates and without dvc.lock."""
    made = Made(tmp_path_factory.mktemp("made"), names=NAMES, seeds=(7,))
    (made.folder / "dvc.lock").unlink()
    return write(made)


def test_report_is_one_accessible_file_without_script(found: Page) -> None:
    assert not found.all("script", "link[href^=http]", "iframe")
    urls = [each[key] for _, each in found.tags for key in ("src", "href") if key in each]
    assert all(re.match(r"data:|#", url or "") for url in urls), "an address of something else"
    assert "url(http" not in found.html
    assert found.all("html") == [{"lang": "en"}]
    assert all(each["alt"] for each in found.all("img"))
    assert all(each["role"] == "img" and each["aria-label"] for each in found.all("svg"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in each for each in found.all("th"))
    anchors = {each["href"] for each in found.all("a")}
    assert anchors == {f"#{each['id']}" for each in found.all("section")}
    identifiers = re.findall(r'\bid="([^"]+)"', found.html)
    assert len(identifiers) == len(set(identifiers))


def test_report_has_its_sections_in_order(found: Page, tmp_path: Path) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", found.html)
    assert titles == [
        *("Methods", "Data", "What training sees", "Backbones", "Training curves", "Classes and confusion"),
        *("Worst mistakes", "Calibration", "Sharpness", "Cost", "Where it comes from"),
    ]
    assert words.verdict(Made(tmp_path, names=NAMES).study()) in found.text
    assert "None was found. Two images count if their perceptual hashes differ in at most 16 of 63 bits" in found.text
    assert "0 labels of train and 0 of val may be wrong" in found.text
    assert "Unknown: nothing says whether two roles share a group" in found.text
    assert "so these figures have no other version" in found.text
    assert re.search(r"3 classes with fewer than 20: .*cat \(5\), dog \(5\)\.", found.text)
    assert "so their flatness can be compared" in found.text
    assert "a/b.png (truncated)" in found.text
    for digest in ("a" * 32, "b" * 32, "c" * 32, "0123abcd"):
        assert digest in found.text
    assert not re.search(r"#0000[01]\d", found.html), "a colour that the page should have replaced"


def test_report_escapes_names_of_classes_and_files(found: Page) -> None:
    assert not found.all("b", "i")
    assert NAMES[2] in found.text
    assert "images/<i>1</i>.png" in found.text


def test_report_same_study_gives_the_same_bytes(found: Page, tmp_path: Path) -> None:
    """Also where dvc.lock has entries of an earlier report, and of a seed that has left."""
    made = Made(tmp_path, names=NAMES, duplicates=8)
    lock = tmp_path / "dvc.lock"
    values = yaml.safe_load(lock.read_text())
    values["stages"]["report"] = {"outs": [{"path": "report", "md5": "d" * 32, "size": 1}]}
    values["stages"]["finetune@99"] = {"outs": [{"path": "models/finetune/99", "md5": "e" * 32, "size": 1}]}
    lock.write_text(yaml.safe_dump(values))
    assert write(made).html == found.html


def test_report_without_labels_of_test_says_so_and_shows_the_rest(tmp_path: Path) -> None:
    found = write(Made(tmp_path, names=NAMES, labelled=False))
    assert "Test has no labels, so nothing says how accurate a method is" in found.text
    assert found.text.count("Test has no labels, so there is nothing to show here.") == 3
    assert "test 18 without labels" in found.text
    assert "largest eigenvalue" in found.text
    assert "differ by more than a tenth between SAM and control" in found.text


def test_report_one_seed_says_what_the_interval_leaves_out(one_seed: Page) -> None:
    found = one_seed
    assert "It is over images, for this training set" in found.text
    assert "With one seed, nothing is known" in found.text
    assert ", 1 seed, 60 test images" in found.text


def test_report_without_dvc_lock_says_so(one_seed: Page) -> None:
    assert "There is no dvc.lock" in one_seed.text


def test_report_shows_equal_pictures_of_two_roles(found: Page, one_seed: Page) -> None:
    assert "None: no decoded image is in two roles" in one_seed.text
    assert "8 of test are in train, too" in found.text
    shown = [each["alt"] for each in found.all("img")]
    assert shown.index("train image train/5.png") + 1 == shown.index("test image test/5.png")
    assert "None: no decoded image" not in found.text


def test_report_shows_what_audit_found_and_scores_without_it(tmp_path: Path) -> None:
    found = write(Made(tmp_path, names=NAMES, near=3, groups={"train": 12, "val": 1}))
    assert "3 of test have one in train (16.7\xa0%)." in found.text
    assert "Near duplicates with different labels: 3 of test have one in train" in found.text
    assert "3 labels of train and 0 of val may be wrong" in found.text
    assert "train has 12 groups, val has 1 group. No two roles share one." in found.text
    shown = [each["alt"] for each in found.all("img")]
    assert shown.index("train image train/2.png, labelled cat") + 1 == shown.index(
        "test image test/2.png, labelled cat"
    )
    assert "test image test/2.png, labelled dog" in shown
    assert "without near duplicates in train" in found.text
    assert "+0.4 (\N{MINUS SIGN}2.0 to +3.0)" in found.text


def test_report_missing_file_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path, names=NAMES)
    (tmp_path / "evaluation/coverage.csv").unlink()
    with pytest.raises(InputError, match=r"coverage.csv: expected a file that an earlier stage wrote, found none"):
        write(made)
    assert not list(tmp_path.glob("*report.html*"))


@pytest.mark.slow
def test_report_of_a_thousand_classes_and_100000_images_is_below_10_megabytes(tmp_path: Path) -> None:
    """With as many pictures as audit and evaluate write at most, of noise, which compresses worst."""
    limits = (gallery.MISTAKES, gallery.PAIRS, gallery.IN_PAIR, gallery.CLASSES, gallery.EACH)
    names = [f"a class with a rather long name, number {index}" for index in range(1000)]
    made = Made(tmp_path, names=names, images=100_000, duplicates=50, near=audit.SHOWN, limits=limits, noise=True)
    assert made.pictures > 300
    found = write(made)
    assert len(found.html.encode()) < 10e6
    assert f"The {gallery.CLASSES} of 1,000 classes that the released model recognises worst" in found.text
    assert names[-1] in found.text
    assert "Confusion matrix of 1000 classes" in found.html


@pytest.mark.parametrize(
    ("gain", "low", "high", "sentence"),
    [
        (-0.009, -0.016, -0.002, "is 0.9 points worse than {} (95 % interval -1.6 to -0.2 points"),
        (0.012, 0.001, 0.02, "is 1.2 points better than {} (95 % interval +0.1 to +2.0 points"),
        (0.012, -0.001, 0.02, "is 1.2 points better than {}, which may be chance (95 % interval -0.1 to +2.0 points"),
        (0.0, -0.01, 0.01, "is as accurate as {} (95 % interval -1.0 to +1.0 points"),
    ],
)
def test_verdict_says_what_the_interval_allows(
    tmp_path: Path, gain: float, low: float, high: float, sentence: str
) -> None:
    study = Made(tmp_path, names=NAMES, gain=gain, low=low, high=high).study()
    expected = sentence.format("plain fine-tuning at equal compute")
    assert words.plain(words.verdict(study)) == f"SAM {expected}, 3 seeds, 60 test images)."


def test_words_name_methods_and_count_points() -> None:
    assert words.unequal("") == ""
    assert (
        words.unequal("finetune and sam; control and sam of seed 7") == "fine-tuned and SAM, control and SAM of seed 7"
    )
    assert [words.within(each) for each in (0.005, 0.01, 0.02)] == ["0.5 points", "1 point", "2 points"]


def test_changed_params_are_those_that_are_no_defaults() -> None:
    assert changed_params(Augment(m=3, crop=0), Augment) == [("m", 3, 7)]
    assert changed_params(EarlyStopping(patience=9), EarlyStopping, "early.") == [("early.patience", 9, 5)]
    required, *_ = changed_params(params.parse(tiny_params()))
    assert required == ("seeds", [7], REQUIRED)


def test_report_imports_no_tensorflow() -> None:
    code = "import sys, flatmin.report.page; sys.exit(bool({'tensorflow', 'keras', 'sklearn'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
