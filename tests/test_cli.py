"""The frame of the command `flatmin`: its help, its exit codes and its one line on wrong usage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flatmin import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_help_names_the_commands_and_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "\n  flatmin export --format onnx\n" in f"\n{out}".replace("    flatmin", "  flatmin")
    assert "\n  export  " in out


def test_help_of_a_command_has_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "export", "--help")
    assert code == 0
    assert "models/final" in out
    assert "litert-int8" in out


def test_no_command_prints_the_help_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert out.startswith("Usage: flatmin")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["exprot"], "No such command 'exprot'"),
        (["export"], "Missing option '--format'"),
        (["export", "--format", "pdf"], "'pdf' is not one of 'keras', 'savedmodel', 'litert', 'litert-int8', 'onnx'"),
        (["export", "--format", "keras", "--fast"], "No such option: --fast"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert part in err


def test_model_that_does_not_exist_is_one_line_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "export", "--format", "keras", "--model", str(tmp_path / "none"))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {tmp_path}/none/model.json: expected")


def test_help_loads_no_library_that_takes_long() -> None:
    program = """
import sys
from flatmin import cli
try:
    cli.main(["export", "--help"])
except SystemExit:
    pass
print({"tensorflow", "keras", "numpy", "scipy", "matplotlib"} & set(sys.modules))
"""
    assert python(program).stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("package", "arguments", "part"),
    [
        ("typer", ["--help"], "flatmin needs typer, of its extra `pipeline`"),
        ("tensorflow", ["predict", "cat.jpg"], "flatmin needs tensorflow, of its extra `pipeline`"),
        ("tf2onnx", ["export", "--format", "onnx"], "onnx needs tf2onnx"),
        ("onnxruntime", ["export", "--format", "onnx"], "onnxruntime, of the extra `export`"),
    ],
)
def test_missing_package_is_one_line_that_names_the_extra(package: str, arguments: list[str], part: str) -> None:
    done = python(f"import sys; sys.modules[{package!r}] = None\nfrom flatmin import cli\ncli.main({arguments!r})")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert part in done.stderr
