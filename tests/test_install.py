"""Installation with pip: the wheel's contents, and the configs that an installed package finds."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from regnet_flax import list_weights

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_holds_one_package_with_the_configs_inside(wheel):
    names = set(wheel.namelist())
    (information,) = (name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.partition("/")[0] for name in names} == {"regnet_flax", information}
    for folder, installed in (("regnet_flax", "regnet_flax"), ("configs", "regnet_flax/configs")):
        for path in (file for suffix in ("py", "cc", "h", "html") for file in (ROOT / folder).rglob(f"*.{suffix}")):
            assert f"{installed}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "regnet_flax/py.typed" in names
    for name in list_weights():
        assert {f"regnet_flax/weights/{name}.safetensors{suffix}" for suffix in ("", ".md")} <= names
    metadata = wheel.read(f"{information}/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: tensorflow")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: tensorflow-datasets>=4.9.10"]
    assert any("extra == 'tfds'" in line for line in required)


# Prints the package's location, and the model that each command finds.
COMMANDS = """
import contextlib, importlib.util, io, pathlib, sys
import regnet_flax
from regnet_flax import main

print(pathlib.Path(regnet_flax.__file__).parent.parent)
for arguments in (
    [],
    ["--config=cifar100.py"],
    ["--config=configs/digits.py"],
    ["--config=mine.py"],
    ["--config=other/configs/theirs.py"],
    ["--config=mine.py:resnet14"],
):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main.main(["--mode=summary", *arguments]) == 0
    (first,) = (line for line in out.getvalue().splitlines() if ", images of " in line)
    print(first.partition(",")[0])
assert importlib.util.find_spec("data") is None, "modules of the package are on the path"
"""

NAMED = """config = fields.default_config()
    config.model.name = "resnet26"
    return config"""

MINE = """
from configs import {config}

def get_config(model="{model}"):
    config = {config}.get_config()
    config.model.name = model
    return config
"""


@pytest.mark.parametrize("installed", [True, False], ids=["wheel", "repository"])
def test_the_shipped_configs_are_found_beside_others_of_that_name(installed, wheel, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('unrelated')")
    (tmp_path / "configs" / "digits.py").write_text(MINE.format(config="digits", model="resnet20"))
    (tmp_path / "mine.py").write_text(MINE.format(config="digits", model="resnet8"))
    other = tmp_path / "other" / "configs"  # laid out like this project
    other.mkdir(parents=True)
    (other.parent / "helper.py").touch()
    base = (ROOT / "configs" / "base.py").read_text()
    (other / "base.py").write_text("import helper\n" + base.replace("return fields.default_config()", NAMED))
    (other / "theirs.py").write_text("from configs.base import get_config\n")
    site = ROOT
    if installed:
        site = tmp_path / "site"
        wheel.extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    models = ["regnet20_convlstm", "regnet20_convlstm", "resnet20", "resnet8", "resnet26", "resnet14"]
    assert done.stdout.splitlines() == [str(site), *models]
