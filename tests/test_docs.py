"""README.md and the pages of docs/: their commands parse, their code runs, their links work."""

import collections
import contextlib
import importlib
import json
import pathlib
import re
import shlex
import sys
import tarfile
import tomllib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, failures, few_digits, run_program
from regnet_flax import main
from regnet_flax.config.check import check_config
from regnet_flax.data.augment import AUGMENTATIONS
from regnet_flax.data.sources import SOURCES
from regnet_flax.models.registry import MODELS
from regnet_flax.models.regnet import BLOCKS, CELLS
from regnet_flax.models.regulators import REGULATORS
from regnet_flax.training.logs import MetricsLog

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [README, *PAGES, ROOT / "CONTRIBUTING.md"]
OTHERS = ("CHANGELOG.md", "benchmarks/README.md", "tests/BREAKS.md", "tests/FAULTS.md", "tests/README.md")
LINKING = [*WRITTEN, *(ROOT / name for name in OTHERS)]
TABLES = (AUGMENTATIONS, BLOCKS, CELLS, MODELS, REGULATORS, SOURCES)
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Replacements that make snippets small, and options that make commands short.
SMALL = {'create_model("regnet20_convlstm"': 'create_model("regnet8_convlstm", width=4', "8, 32, 32": "8, 8, 8"}
SHORT = [
    *("--config.train.max_steps=2", "--config.train.batch_size=16"),
    *("--config.model.overrides.width=4", "--config.model.overrides.unroll=1"),
]


class Block(NamedTuple):
    language: str
    title: str
    code: str


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    found = [Block(language, title or "", code) for language, title, code in FENCE.findall(path.read_text())]
    return [block for block in found if block.language == language]


def commands(path):
    """Returns the arguments of every run of the program, each as a list."""
    text = "\n".join(block.code for block in blocks(path, "sh")).replace("\\\n", " ").replace("$rate", "0.05")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "regnet_flax.main" in line]
    return [line[line.index("regnet_flax.main") + 1 :] for line in lines]


def modules(path):
    """Returns the modules that a page tells its reader to write, as (file, code)."""
    return [(block.title, block.code) for block in blocks(path, "python") if is_new(block)]


def is_new(block):
    """Whether the title is a file to write; otherwise the block quotes a file of the repository."""
    return block.title and not (ROOT / block.title).exists()


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """Runs each test in its own directory, and undoes what it registers, imports and writes."""
    before, loaded = [(table, dict(table)) for table in TABLES], set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    importlib.invalidate_caches()
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)
    for name in set(sys.modules) - loaded:
        if name.startswith(("my_", "mine")):
            del sys.modules[name]


@pytest.fixture
def files(tmp_path):
    """The files that a reader has by then: trained runs, and pictures."""
    with tarfile.open(ROOT / "tests" / "stored" / "lone.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "runs").mkdir()
    (tmp_path / "lone").rename(tmp_path / "runs" / "digits-regnet20_convlstm-0")
    (tmp_path / "runs" / "folder-DIR-regnet20_convlstm-0").symlink_to("digits-regnet20_convlstm-0")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10), np.uint8))
    for name in ("DIGIT.png", "PHOTO.jpg"):
        picture.save(tmp_path / name)
    for split, count in (("train", 20), ("test", 4)):
        for label in ("ants", "bees"):
            folder = tmp_path / "DIR" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                picture.rotate(number).save(folder / f"{number}.png")
    return tmp_path


def run_snippets(path, replaced=()):
    """Runs a page's code from top to bottom, as one program."""
    space = {"__name__": "__main__"}
    for block in blocks(path, "python"):
        if block.title and not is_new(block):
            continue
        code = block.code
        for old, new in dict(replaced).items():
            code = code.replace(old, new)
        if block.title:
            pathlib.Path(block.title).write_text(code)
        else:
            exec(compile(code, f"{name_of(path)}: {code.splitlines()[0]}", "exec"), space)
    return space


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


def test_every_command_is_understood():
    """Checks flags, fields, values, configs and models, without training."""
    seen = 0
    with failures() as case:
        for path in WRITTEN:
            for file, code in modules(path):
                pathlib.Path(file).write_text(code)
            for arguments in commands(path):
                seen += 1
                with case(f"{name_of(path)}: {shlex.join(arguments)}"):
                    if arguments in (["--help"], ["--helpfields"]):
                        assert main.main(arguments) == 0
                        continue
                    config, _ = main.parse(arguments)
                    config.dataset.data_dir = config.dataset.data_dir or "DIR"
                    check_config(config)
    assert seen > 40


def test_other_commands_name_what_there_is():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    seen = collections.Counter()
    with failures() as case:
        for path in WRITTEN:
            text = "\n".join(block.code for block in blocks(path, "sh"))
            for names in re.findall(r'(?:-e |")\.\[([\w,]+)\]', path.read_text()):
                seen["extras"] += 1
                with case(f"{name_of(path)}: .[{names}]"):
                    assert set(names.split(",")) <= extras.keys()
            for file in re.findall(r"(?<![\w/])(?:tests|benchmarks|notebooks|configs)/[\w/*{},]+\.\w+", text):
                seen["files"] += 1
                with case(f"{name_of(path)}: {file}"):
                    assert list(ROOT.glob(file))
    assert seen["extras"] > 10 and seen["files"] > 20


def slug(heading):
    """Returns the anchor of a heading, like GitHub and mkdocs."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower())).strip("-")


def anchors(path):
    lines = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE).splitlines()
    headings = {slug(line.lstrip("# ")) for line in lines if line.startswith("#")}
    return headings | {line.removeprefix("::: ") for line in lines if line.startswith("::: ")}


def test_every_link_leads_somewhere():
    seen = 0
    with failures() as case:
        for path in LINKING:
            for target in LINK.findall(path.read_text()):
                if target.startswith(("http:", "https:")):
                    continue
                seen += 1
                file, _, anchor = target.partition("#")
                with case(f"{name_of(path)}: {target}"):
                    there = (path.parent / file).resolve() if file else path
                    assert there.exists() and there.is_relative_to(ROOT)
                    assert not anchor or anchor in anchors(there)
    assert seen > 100


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES} == {n for n in named if not n.startswith("repo/")}


def test_quoted_code_is_that_of_the_package():
    """A block titled with a file has lines of that file, in order; docstrings may be missing."""
    seen = 0
    with failures() as case:
        for path in WRITTEN:
            for block in blocks(path, "python"):
                if not block.title or is_new(block):
                    continue
                seen += 1
                left = iter((ROOT / block.title).read_text().splitlines())
                with case(f"{name_of(path)}: {block.title}"):
                    missing = [line for line in block.code.splitlines() if line.strip() and line not in left]
                    assert not missing
    assert seen > 8


def test_the_readmes_code_runs(files):
    space = run_snippets(README, SMALL)
    assert space["logits"].shape == (8, 10) and "batch_stats" in space["updates"]
    assert space["probabilities"].shape == (1, 10)
    # The program accepts the cell that the README shows.
    done = run_program("--mode=summary", *commands(README)[-1], check=0)
    assert "regnet20_leaky" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_pages_code_runs(page, files):
    for kind, file in (("stablehlo", "model.stablehlo"), ("safetensors", "weights.safetensors")):
        if any(file in block.code for block in blocks(page, "python")):
            run_program(
                "--mode=export", "--workdir=runs/digits-regnet20_convlstm-0", f"--config.export.format={kind}",
                f"--config.export.path={file}", check=0,
            )  # fmt: skip
    # The page about nn.scan needs stages with blocks to scan.
    run_snippets(page, {} if page.stem == "scan" else SMALL)


@pytest.mark.filterwarnings("ignore")
def test_the_sweep_runs(tmp_path):
    """Optuna's, for two trials of a smaller network on a few digits."""
    pytest.importorskip("optuna")
    (block,) = (block for block in blocks(ROOT / "docs/guides/comparing.md", "python") if block.title == "sweep.py")
    code = block.code
    small = "config.train.max_steps, config.train.batch_size, config.model.overrides.width = 2, 32, 4\n    return train"
    for old, new in (
        ('["resnet14", "regnet14_convgru", "regnet14_convlstm"]', '["resnet8"]'),
        ("=20", "=2"),
        ("return train", small),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    space = {"__name__": "__main__"}
    with few_digits():
        exec(code, space)
        exec(code, space)  # adds trials to the same sweep
    assert len(space["study"].trials) == 4 and space["study"].best_value > 0
    assert {path.name for path in (tmp_path / "runs/sweep").iterdir()} == {"0", "1", "2", "3"}


@pytest.mark.filterwarnings("ignore")
def test_the_conversion_to_onnx_runs(files):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    (block,) = (block for block in blocks(ROOT / "docs/guides/exporting.md", "python") if block.title == "to_onnx.py")
    space = {"__name__": "__main__"}
    exec(block.code, space)
    session = runtime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    for count in (3, 1):
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.astype(np.float32)})
        expected = space["trained"].predict(images)
        np.testing.assert_allclose(jax.nn.softmax(found), expected, atol=1e-5)


def test_a_tracker_of_ones_own_is_one(tmp_path):
    (block,) = blocks(ROOT / "docs/guides/tracking.md", "python")
    pathlib.Path(block.title).write_text(block.code)
    (tmp_path / "run").mkdir()
    for steps in ((1, 2), (3,)):
        with MetricsLog(tmp_path / "run", 0, ["my_tracker:Lines"], {"seed": 1}) as log:
            for step in steps:
                log.write({"step": step, "eval_loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"run"}
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3] and lines[1]["eval/loss"] == 0.5


@pytest.mark.slow
def test_the_readmes_commands_run(files):
    """The first runs to its end, the others for two steps; CIFAR's, without its images, as a summary."""
    first, *rest = commands(README)
    done = run_program(*first, "--workdir=runs/first", check=0)
    accuracy = re.search(r"test accuracy ([\d.]+) % at the end", done.stdout + done.stderr)
    assert accuracy and float(accuracy[1]) > 98
    for file, code in modules(README):
        pathlib.Path(file).write_text(code)
    jax.config.update("jax_disable_most_optimizations", True)  # two steps take less time than compiling them
    with failures() as case, contextlib.ExitStack() as stack:
        stack.callback(jax.config.update, "jax_disable_most_optimizations", False)
        for number, arguments in enumerate(rest):
            more = [*SHORT, f"--workdir=runs/{number}"]
            if "predict" in arguments:
                more = []
            elif any("cifar10" in argument for argument in arguments):
                more.append("--mode=summary")
            with case(shlex.join(arguments)):
                run_program(*arguments, *more, check=0)
