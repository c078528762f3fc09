"""Finds config files and the `configs` package that they import."""

import difflib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from regnet_flax.errors import UsageError, one_line
from regnet_flax.files import expanded

PACKAGE = Path(__file__).resolve().parent.parent
# A wheel has the configs inside the package; the repository has them beside it.
SHIPPED = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
DEFAULT_CONFIG = "configs/digits.py"


def find_config(name: str | None) -> str:
    """Finds a config file: first as a path, then among the shipped configs.

    Args:
      name: a path such as "mine.py" or "configs/cifar10.py", followed by ":" and the config's argument if it has one;
        None for the shipped DEFAULT_CONFIG, regardless of the current directory.

    Returns:
      The absolute path, followed by ":" and the argument if there is one.

    Raises:
      UsageError: no such file exists.
    """
    file, colon, argument = (name or DEFAULT_CONFIG).partition(":")
    shipped = SHIPPED / file.removeprefix("configs/")
    for path in (shipped,) if name is None else (expanded(file, "--config"), shipped):
        if path.is_file():
            return f"{path.resolve()}{colon}{argument}"
    names = sorted(path.stem for path in SHIPPED.glob("*.py") if path.name != "__init__.py")
    close = difflib.get_close_matches(Path(file).stem, names, n=2, cutoff=0.7)
    listed = (f"configs/{stem}.py" for stem in close or names)
    hint = f"did you mean {' or '.join(listed)}?" if close else f"shipped are {', '.join(listed)}"
    raise UsageError(f"--config {file} is not a file: {hint}")


def provide_configs(config_file: str) -> None:
    """Makes `from configs import base` work in a config file in any directory.

    `configs` is this package's own, unless the folder above the config file's has a configs/base.py, as in another
    project laid out like this one: then it is that project's.

    Args:
      config_file: the config file's absolute path.

    Raises:
      UsageError: that project's configs/__init__.py raises an error.
    """
    project = Path(config_file).parent.parent
    folder = project / "configs" if (project / "configs" / "base.py").is_file() else SHIPPED
    if folder != SHIPPED and sys.path[0] != str(project):
        sys.path.insert(0, str(project))
    if list(getattr(sys.modules.get("configs"), "__path__", ())) == [str(folder)]:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    # sys.path will not do: in a wheel the package's modules lie beside this folder, and would be importable too.
    init = folder / "__init__.py"
    spec = spec_from_file_location("configs", init, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules["configs"] = module = module_from_spec(spec)
    if init.is_file():
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UsageError(f"{init}: {one_line(error)}") from error
