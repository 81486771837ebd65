"""The package as a library: what it imports, and that nothing else depends on it being part of Flatmin."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flatmin import sam

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/flatmin/sam"


def run(code: str, path: Path = ROOT / "src") -> str:
    # Without the variables that the tests' own process may have set for TensorFlow.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["flatmin.sam", "flatmin.sam.methods", "flatmin.sam.settings"])
def test_import_of_table_and_settings_loads_neither_tensorflow_nor_keras(module: str) -> None:
    loaded = run(
        f"import sys, {module} as module\n"
        "module.METHODS, getattr(module, 'Settings', int)()\n"
        "print({name.split('.')[0] for name in sys.modules} & {'tensorflow', 'keras', 'numpy'})"
    )
    assert loaded == "set()\n"


def test_every_public_name_can_be_imported() -> None:
    assert set(sam.__all__) <= set(dir(sam))
    assert all(getattr(sam, name) is not None for name in sam.__all__)
    with pytest.raises(AttributeError, match=r"module 'flatmin\.sam' has no attribute 'Stepp'"):
        sam.Stepp  # noqa: B018


def test_package_imports_keras_and_one_backend_only() -> None:
    for path in PACKAGE.glob("*.py"):
        backend = path.stem.removesuffix("_backend")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                known = {*sys.stdlib_module_names, "keras"}
                assert node.level == 1 or (node.module or "").split(".")[0] in known, path
            elif isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert names <= {*sys.stdlib_module_names, "keras", "numpy", backend}, path


@pytest.mark.slow
def test_package_copied_by_itself_trains(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "copied", ignore=shutil.ignore_patterns("__pycache__"))
    printed = run(
        "import sys, keras, numpy as np, copied\n"
        "model = copied.SharpnessAwareMinimization(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))\n"
        "model.compile('sgd', 'mse')\n"
        "model.fit(np.ones((8, 3)), np.ones(8), verbose=0)\n"
        "print(model._step.gradient_evaluations, 'flatmin' in sys.modules)",
        tmp_path,
    )
    assert printed == "16 False\n"


NEW_METHOD = """
METHODS["made-up"] = Method(
    paper="Nobody 2000",
    when="never",
    settings={"strength": MethodSetting(default=0.5, below=2, meaning="how much of the gradient is used")},
    gradients=("perturbed",),
    final_gradient=lambda settings, gradients, _: ([settings.strength * each for each in gradients["perturbed"]], {}),
)
"""
USES_OF_NEW_METHOD = """
import inspect
import keras, numpy as np
from flatmin import sam
from flatmin.common import params

assert "| `made-up` | Nobody 2000 | `strength` (0.5) | never |" in sam.methods_table()
assert sam.Settings(method="made-up").strength == 0.5
assert "strength: made-up: how much of the gradient is used." in sam.Settings.__doc__
assert params.Sam.model_validate({"method": "made-up", "strength": 1}).settings()["strength"] == 1
for wrong in ({"strength": 1}, {"method": "made-up", "strength": 2}, {"method": "made-up", "alpha": 1}):
    for check in (params.Sam.model_validate, lambda settings: sam.Settings(**settings)):
        try:
            check(wrong)
        except ValueError:
            continue
        raise AssertionError(wrong)
signature = inspect.signature(sam.SharpnessAwareMinimization)
assert signature.parameters["strength"].kind is inspect.Parameter.KEYWORD_ONLY
moved = []
for settings in ({}, {"method": "made-up"}):
    layer = keras.layers.Dense(1, kernel_initializer="ones")
    model = sam.SharpnessAwareMinimization(keras.Sequential([keras.Input((3,)), layer]), **settings)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.ones((8, 3)), np.ones(8), batch_size=8, verbose=0)
    moved.append(1 - float(layer.kernel[0, 0]))
np.testing.assert_allclose(moved[1], 0.5 * moved[0], rtol=1e-5)
print("trained")
"""


@pytest.mark.slow
def test_new_method_in_methods_py_reaches_settings_schema_signature_and_docs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src/flatmin", tmp_path / "flatmin", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "flatmin/sam/methods.py").open("a") as file:
        file.write(NEW_METHOD)
    assert run(USES_OF_NEW_METHOD, tmp_path) == "trained\n"
