"""The import rules, checked against the import statements."""

import ast
import collections
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "regnet_flax").rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path, *, inside_functions=True):
    """Returns the modules that a file imports: for `from a import b` both a and a.b, because b may be a module."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside_functions else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name, module):
    return name == module or name.startswith(module + ".")


def offenders(where, forbidden, *, but=(), inside_functions=True):
    return [
        f"{module_name(path)} imports {name}"
        for path in PACKAGE
        if is_in(module_name(path), where) and not any(is_in(module_name(path), other) for other in but)
        for name in imports(path, inside_functions=inside_functions)
        if any(is_in(name, module) for module in forbidden)
    ]


P = "regnet_flax"
RULES = [
    (
        f"{P}.models",
        [
            *(f"{P}.{room}" for room in ("data", "training", "modes", "analysis")),
            *("tensorflow", "grain", "ml_collections", "optax"),
        ],
        (),
    ),
    (f"{P}.data", [f"{P}.models", f"{P}.training", f"{P}.modes", "flax"], ()),
    (P, ["configs", "tests", f"{P}.main"], ()),
    (f"{P}.config", [f"{P}.training", f"{P}.modes", f"{P}.analysis"], ()),
    (f"{P}.training", [f"{P}.modes"], ()),
    (f"{P}.trackers", [f"{P}.training", f"{P}.modes", f"{P}.data", f"{P}.analysis"], ()),
    (f"{P}.analysis", [f"{P}.data", f"{P}.training", f"{P}.modes", f"{P}.config"], ()),
    (f"{P}.port", [f"{P}.data", f"{P}.training", f"{P}.modes", f"{P}.config", f"{P}.analysis"], ()),
    (P, ["torch"], (f"{P}.port.weights",)),
    (P, ["tensorflow"], ()),
    (P, ["matplotlib"], (f"{P}.analysis.plots",)),
    (f"{P}.training.step", [f"{P}.models", f"{P}.data"], ()),
]


@pytest.mark.parametrize("where, forbidden, but", RULES)
def test_imports_that_must_not_exist(where, forbidden, but):
    names = [module_name(path) for path in PACKAGE]
    own = [module for module in (where, *forbidden, *but) if is_in(module, P)]
    assert all(any(is_in(name, module) for name in names) for module in own), "a module was renamed"
    assert not offenders(where, forbidden, but=but)


def test_torch_only_inside_functions():
    assert not offenders(P, ["torch"], inside_functions=False)


def test_the_rules_see_what_they_forbid(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from regnet_flax import training\ndef f():\n    import tensorflow.io\n")
    assert {"regnet_flax.training", "tensorflow.io"} <= set(imports(file))


def calls(path, *names):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in names]


def test_the_only_pmap_is_in_parallel_and_reductions_are_in_the_step_and_batch_normalisation():
    mapped = {module_name(path) for path in PACKAGE for n in calls(path, "pmap") if getattr(n.value, "id", "") == "jax"}
    assert mapped == {f"{P}.training.parallel"}
    # A batch normalisation over several devices has its own pmean, like Flax's.
    reduced = {module_name(path) for path in PACKAGE if calls(path, "pmean", "psum")}
    assert reduced == {f"{P}.training.step", f"{P}.models.ops.plain"}


def test_folders_are_small():
    names = collections.defaultdict(list)
    for path in (ROOT / "regnet_flax").rglob("*"):
        if path.suffix in (".py", ".h", ".cc") and path.stem != "__init__":
            names[path.parent].append(path.name)
    assert len(names) > 15 and max(map(len, names.values())) <= 10, names


def test_only_what_every_mode_needs_is_imported_at_start():
    """So an image folder trains without TFDS, TensorFlow, Grain, scikit-learn, tensorboardX and safetensors."""
    late = ["ml_collections", "tensorflow", "tensorflow_datasets", "grain", "sklearn", "matplotlib", "tensorboardX"]
    late += ["safetensors", "torch", "scipy.io", "wandb", "mlflow", "trackio", "huggingface_hub"]
    code = f"import sys, regnet_flax.main, regnet_flax.modes.train; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
