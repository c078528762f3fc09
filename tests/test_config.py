"""The shipped configs, and the messages about wrong values."""

import contextlib
import copy
import importlib
import json
import math
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT, failures
from regnet_flax.config.check import check_config, flatten, model_options
from regnet_flax.config.fields import FIELDS
from regnet_flax.config.files import find_config
from regnet_flax.config.resolve import changed_fields
from regnet_flax.errors import ConfigError, UsageError
from regnet_flax.models.registry import list_models
from regnet_flax.training.optimizer import boundary_steps

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def load(name):
    """Loads a config like the command line: `from configs import NAME`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"configs.{name}").get_config()


DIGITS = load("digits").to_dict()
DIGITS["train"] |= {"batch_size": 64, "epochs": 30}  # used by the contradictions below


def changed(values):
    """Returns the digits config with other values: {"train.batch_size": 1}."""
    config = copy.deepcopy(DIGITS)
    for field, value in values.items():
        *sections, name = field.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


def problems(values, devices=1):
    """Returns the lines of the ConfigError for a config with these values."""
    with pytest.raises(ConfigError) as caught:
        check_config(changed(values), devices)
    return str(caught.value).split("\n")


# The configs


def test_the_shipped_configs_are_right():
    with failures() as case:
        for name in CONFIGS:
            with case(name):
                config = load(name)
                if config.dataset.name == "folder":
                    config.dataset.data_dir = "photos"
                check_config(config, devices=8)
                assert {field for field, _ in flatten(config)} == FIELDS.keys()
                assert config.model.name in list_models() and model_options(config)
                # Tuples can be overridden on the command line, lists cannot.
                sections = [section for section in config.to_dict().values() if isinstance(section, dict)]
                assert not [value for section in sections for value in section.values() if isinstance(value, list)]


def test_a_wrong_name_of_a_config_is_answered_with_the_nearest():
    with pytest.raises(
        UsageError, match=r"--config configs/imagnet.py is not a file: did you mean configs/imagenet.py\?"
    ):
        find_config("configs/imagnet.py:resnet50")
    with pytest.raises(
        UsageError, match=r"--config mine.py is not a file: shipped are .*configs/digits.py, configs/fold"
    ):
        find_config("mine.py")


def test_configs_take_the_model_as_their_argument():
    with failures() as case, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        for name in CONFIGS:
            if name != "base" and "compare" not in name:
                with case(name):
                    config = importlib.import_module(f"configs.{name}").get_config("regnet56_convgru")
                    assert config.model.name == "regnet56_convgru"


def test_the_papers_cifar_recipe():
    config = load("cifar10")
    found = {field: value for field, value in flatten(config) if field.startswith(("optimizer.", "train."))}
    expected = {
        "train.batch_size": 128,
        "train.epochs": 200,
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 1e-4,
        "optimizer.schedule": "step",
        "optimizer.boundaries": (0.5, 0.75),
        "optimizer.decay": 0.1,
        "optimizer.warmup_epochs": 0,
        "optimizer.label_smoothing": 0,
        "optimizer.clip_norm": 0,
    }
    assert {field: found[field] for field in expected} == expected
    assert config.dataset.augment == ("crop", "flip")
    assert load("cifar100").dataset.name == "cifar100"


def test_the_recipe_for_photographs_of_ones_own():
    found = dict(flatten(load("rnn_photos")))
    expected = {
        "dataset.image_size": 32,
        "dataset.augment": ("flip", "rotate", "color", "translate"),
        "dataset.mean": (0.5,),
        "dataset.std": (0.5,),
        "train.batch_size": 64,
        "train.epochs": 150,
        "optimizer.learning_rate": 0.1,
        "optimizer.boundaries": (80,),
        "optimizer.decay": 0.1,
        "optimizer.weight_decay": 1e-4,
    }
    assert {field: found[field] for field in expected} == expected


def test_the_papers_imagenet_recipe_and_a_modern_one():
    paper = load("imagenet")
    assert (paper.train.batch_size, paper.train.epochs, paper.optimizer.learning_rate) == (256, 100, 0.1)
    assert (paper.optimizer.schedule, paper.optimizer.decay) == ("step", 0.1)
    assert boundary_steps(paper.optimizer.boundaries, 100, 10) == [300, 600, 900]
    assert (paper.optimizer.momentum, paper.optimizer.weight_decay, paper.optimizer.label_smoothing) == (0.9, 1e-4, 0)
    assert (paper.dataset.mean, paper.dataset.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        get_config = importlib.import_module("configs.imagenet").get_config
    modern = get_config("resnet101,modern")
    assert modern.model.name == "resnet101"
    assert (modern.optimizer.schedule, modern.optimizer.label_smoothing, modern.optimizer.ema_decay) == (
        "cosine",
        0.1,
        0.9999,
    )
    assert modern.dataset.augment == ("random_resized_crop", "flip", "trivialaugment", "erase")
    assert (modern.train.mixup, modern.train.cutmix, modern.optimizer.decayed) == (0.2, 1.0, "kernels")
    with pytest.raises(ValueError, match="configs/imagenet.py:resnet50,modern"):
        get_config("resnet50,newest")


# Wrong values

WRONG = {
    "seed": [-1, 0.5, "0", True, None, 2**31],
    "dtype": ["float16", "", 32, None, ["float32"]],
    "model.name": [20, None, b"resnet20"],
    "model.plugins": ["os", ("my module",), ("my/module.py",), (".os",), (1,), None],
    "model.init_from": [None, 3, b"w.pth"],
    "model.new_head": [1, "yes", None],
    "model.adapt_stem": [0, "True"],
    "model.overrides.share_regulator": ["no", 1],
    "model.overrides.regulated_stages": [1, "12", (0,), (1.5,), ("1",), (True,)],
    "model.overrides.remat": ["yes", 0],
    "dataset.name": ["cifar", "", 10, None],
    "dataset.data_dir": [None, 3, pathlib.Path("x")],
    "dataset.num_classes": [-1, 10.0, "10", False],
    "dataset.validation": [-1, 1.5, math.nan, math.inf, "0.1", True, None],
    "dataset.in_memory": ["sometimes", True],
    "dataset.workers": [-1, 1.0, "2", None, 2000],
    "dataset.prefetch": [0, 1.5, True],
    "dataset.strict": [1, "False", None],
    "dataset.image_size": [-32, 32.0, (32, 32)],
    "dataset.augment": ["crop", ("crop", "mixup"), (None,), {"crop"}],
    "dataset.mean": [0.5, (math.nan,), ("0.5",), (math.inf,), None],
    "dataset.std": [(0.0,), (-1.0,), (math.nan,), 1.0],
    "train.batch_size": [0, -128, 128.0, "128", True],
    "train.epochs": [0, 1.5, math.nan, None],
    "train.max_steps": [-1, 0.5, "all"],
    "train.steps_per_call": [-1, 1.5],
    "train.batch_norm": ["synchronised", False],
    "train.mixup": [-0.2, math.nan, "0.2", True],
    "train.cutmix": [-1, math.inf, None],
    "optimizer.name": ["adam", "", None],
    "optimizer.betas": [0.9, (1.5, 0.9), (0.9, math.nan), ("0.9", 0.9), None],
    "optimizer.decayed": ["biases", "regulators", True, None],
    "optimizer.learning_rate": [0, -0.1, math.nan, math.inf, -math.inf, "0.1", True, 1e7, 10**400],
    "optimizer.momentum": [-0.1, 1.1, math.nan, None],
    "optimizer.nesterov": [0, "True"],
    "optimizer.weight_decay": [-1e-4, math.nan, math.inf, "0"],
    "optimizer.schedule": ["linear", 0, None],
    "optimizer.boundaries": [0.5, (0,), (-1,), (math.nan,), (math.inf,), ("0.5",), (0.5, None), (1e308,)],
    "optimizer.decay": [0, 1.5, math.nan],
    "optimizer.warmup_epochs": [-1, math.nan, math.inf, "1", 10**400],
    "optimizer.label_smoothing": [-0.1, 1.1, math.nan],
    "optimizer.clip_norm": [-1, math.nan, math.inf, 10**400],
    "optimizer.accumulate_steps": [0, 1.5, "2", True],
    "optimizer.ema_decay": [-0.1, 1, 1.0, math.nan, None],
    "eval.batch_size": [-1, 1.0],
    "eval.every_epochs": [-1, 0.5],
    "eval.checkpoint": ["newest", "", "-1", "1.0", "²", -1, 1.0, True, None],
    "log.every_steps": [-1, 1.0],
    "log.trackers": ["wandb", ("tensorbord",), (1,), (":Class",), ("my_module:",), ("my-module:Class",), None],
    "checkpoint.every_steps": [-1, 2.5],
    "checkpoint.keep": [0, -1, 1.0],
    "checkpoint.keep_best": [-1, None],
    "compare.models": ["resnet20", (20,), None],
    "compare.seeds": [3, (-1,), (0.5,), ("0",)],
    "compare.together": [True, "yes"],
    "predict.images": [None, 3],
    "predict.top": [0, 1.5],
    "predict.json": ["yes", 1],
    "export.format": ["onnx", "", None],
    "export.path": [None, 3],
    "demo.host": [None, 127],
    "demo.port": [-1, 65536, 80.0, "http"],
}


def test_a_wrong_value_is_one_line_with_field_value_and_mend(fault):
    assert {field for field in FIELDS if not field.startswith("model.overrides.")} <= WRONG.keys()
    with failures() as case:
        for field, value in [(field, value) for field, values in WRONG.items() for value in values]:
            with case(f"{field}={value!r}"):
                (line,) = problems({field: value})
                shown = tuple(value) if isinstance(value, list) else value
                assert line.startswith(f"{field} is {shown!r}: it must be "), line
                assert len(line) > len(f"{field} is {shown!r}: it must be "), line
            fault("a wrong value of one field")


RIGHT = {
    "model.overrides.share_regulator": [False],
    "model.overrides.regulated_stages": [(1, 3), (), [2]],
    "model.overrides.remat": [True],
    "dataset.mean": [()],
    "dataset.validation": [0, 0.1, 1, 5000.0],
    "dataset.workers": [0, 16],
    "dataset.prefetch": [1, 8],
    "optimizer.learning_rate": [1, 1e-9],
    "optimizer.momentum": [0, 1],
    "optimizer.label_smoothing": [0, 1.0],
    "optimizer.warmup_epochs": [0, 0.5, 30],
    "optimizer.boundaries": [(), (0.5,), [0.5, 20]],
    "eval.checkpoint": ["best", "last", "1200", "0", 1200],
    "train.max_steps": [0, 10],
    "checkpoint.keep": [1, 10],
    "checkpoint.keep_best": [0],
    "compare.models": [(), ("resnet20",), ("regnet20_convlstm kernel=dense", "regnet20_convlstm")],
    "compare.seeds": [(0,), (5, 1)],
}


def test_a_right_value_passes():
    with failures() as case:
        for field, value in [(field, value) for field, values in RIGHT.items() for value in values]:
            with case(f"{field}={value!r}"):
                check_config(changed({field: value}))


FOLDER = {"dataset.name": "folder", "dataset.data_dir": "photographs", "dataset.image_size": 224}


STREAMED = [
    {**FOLDER, "dataset.augment": ("random_resized_crop", "flip")},
    {**FOLDER, "dataset.in_memory": "never"},
    {"dataset.name": "imagenet2012", "dataset.augment": ("random_resized_crop",)},
    {"dataset.name": "imagenet2012", "dataset.in_memory": "never", "dataset.image_size": 0},
]


def test_what_can_be_streamed_passes():
    with failures() as case:
        for values in STREAMED:
            with case(values):
                check_config(changed(values))


# Values that contradict each other: the start of the line, and its other parts.
CONTRADICTIONS = [
    ({"model.name": "regnet20_convlsmt"}, "model", ["'regnet20_convlsmt'", "regnet20_convlstm"]),
    ({"model.name": "resnet21"}, "model", ["'resnet21'", "6m+2", "20 or 26"]),
    ({"model.name": "regnet4_convgru"}, "model", ["'regnet4_convgru'", "8"]),
    ({"model.overrides.kernel": "densest"}, "model", ["kernel is 'densest'", "separable", "dense"]),
    ({"model.overrides.shortcut": "C"}, "model", ["shortcut is 'C'", "'A', 'B'"]),
    ({"model.overrides.init": 1}, "model", ["init is 1", "paper", "torch"]),
    ({"model.overrides.width": 0}, "model", ["width is 0", "at least 1"]),
    ({"model.overrides.unroll": 1.5}, "model", ["unroll is 1.5", "at least 1"]),
    ({"model.overrides.regulated_stages": (4,)}, "model", ["regulated_stages", "4", "1 to 3"]),
    ({"model.overrides.bottleneck_stride": "3x3"}, "model", ["bottleneck_stride is '3x3'", "use '1x1'"]),
    (
        {"optimizer.schedule": "step", "optimizer.boundaries": (20, 10)},
        "optimizer.boundaries is (20, 10):",
        ["order"],
    ),
    (
        {"optimizer.schedule": "step", "optimizer.boundaries": (10, 10)},
        "optimizer.boundaries is (10, 10):",
        ["once"],
    ),
    # Half of 30 epochs is epoch 15.
    ({"optimizer.boundaries": (0.5, 15)}, "optimizer.boundaries is (0.5, 15):", ["once"]),
    (
        {"optimizer.schedule": "step", "optimizer.boundaries": (10, 31)},
        "optimizer.boundaries is (10, 31):",
        ["train.epochs=30"],
    ),
    ({"dataset.mean": (0.1, 0.2, 0.3)}, "dataset.mean has 3 values and dataset.std 0:", ["one value per channel"]),
    ({"dataset.std": (0.1,)}, "dataset.mean has 0 values and dataset.std 1:", ["()"]),
    ({"optimizer.nesterov": True, "optimizer.momentum": 0.0}, "optimizer.nesterov is True:", ["momentum above 0"]),
    ({"optimizer.warmup_epochs": 30.5}, "optimizer.warmup_epochs is 30.5:", ["train.epochs=30"]),
    ({"dataset.name": "folder"}, "dataset.data_dir is '':", ["--config.dataset.data_dir=DIR"]),
    ({"compare.seeds": (0, 1, 0)}, "compare.seeds is (0, 1, 0):", ["each seed once"]),
    *[
        ({"compare.models": ("resnet20", wrong)}, f"compare.models, {wrong!r}:", parts)
        for wrong, parts in {
            "regnet20_convlsmt": ["regnet20_convlstm"],
            "resnet20 kernal=dense": ["'kernal'", "did you mean kernel"],
            "resnet20 scan=False": ["'scan'", "kernel or share_regulator"],
            "regnet20_convgru kernel=densest": ["kernel is 'densest'", "'separable', 'dense'"],
            "regnet20_convgru regulated_stages=(4,)": ["stages of regnet20_convgru are 1 to 3"],
            "regnet20_convgru regulated_stages=(1)": ["regulated_stages is 1", "a tuple, such as '(1, 2)'"],
            "regnet20_convgru share_regulator=no": ["share_regulator is 'no'", "True or False"],
            "regnet20_convgru dense": ["'dense' is not understood", "NAME OPTION=VALUE"],
            "regnet20_convgru width=(8": ["width=(8 is not understood"],
            "resnet20 width=8 width=4": ["width is given twice"],
            "regnet_proj_cifar kernel=separable": ["always 'dense'"],
            " ": ["name is missing"],
        }.items()
    ],
    ({"compare.models": ("resnet20  width=8", "resnet20 width = 8")}, "compare.models has", ["each model once"]),
    ({"dataset.in_memory": "never"}, "dataset.in_memory is 'never':", ["imagenet2012 and folder", "digits"]),
    (
        {"dataset.augment": ("random_resized_crop",)},
        "dataset.augment has random_resized_crop",
        ["digits takes 'crop'"],
    ),
    ({**FOLDER, "dataset.augment": ("flip", "random_resized_crop")}, "dataset.augment is ('flip',", ["come first"]),
    ({"optimizer.name": "adamw", "optimizer.momentum": 0.5}, "optimizer.momentum is 0.5:", ["sgd", "not adamw"]),
    ({"optimizer.betas": (0.5, 0.9)}, "optimizer.betas is (0.5, 0.9):", ["adamw and lamb", "not sgd"]),
    ({"optimizer.name": "lamb", "optimizer.betas": (0.5,)}, "optimizer.betas is (0.5,):", ["two numbers"]),
    ({"dataset.validation": 0.1, "checkpoint.keep_best": 0}, "dataset.validation is 0.1:", ["at least 1"]),
    ({"dataset.augment": ("erase", "flip")}, "dataset.augment is ('erase',", ["come last"]),
    (
        {**FOLDER, "dataset.augment": ("random_resized_crop",), "dataset.in_memory": "always"},
        "dataset.in_memory is 'always':",
        ["random_resized_crop", "auto or never"],
    ),
    (
        {"dataset.name": "imagenet2012", "dataset.in_memory": "always"},
        "dataset.in_memory is 'always':",
        ["imagenet2012 does not fit", "auto"],
    ),
    (
        {**FOLDER, "dataset.image_size": 0, "dataset.in_memory": "never"},
        "dataset.image_size is 0:",
        ["such as 224"],
    ),
]


def test_a_contradiction_is_one_line_with_field_value_and_mend(fault):
    with failures() as case:
        for values, start, parts in CONTRADICTIONS:
            with case(values):
                (line,) = problems(values)
                assert line.startswith(start), line
                assert not [part for part in parts if part not in line], line
            fault("values that contradict each other")


def test_boundaries_beyond_the_run_matter_to_the_step_schedule_only():
    check_config(changed({"optimizer.schedule": "cosine", "optimizer.boundaries": (10, 31)}))


@pytest.mark.parametrize(("batch", "nearest"), [(30, 24), (7, 8), (100, 96)])
def test_a_batch_that_the_devices_do_not_divide(batch, nearest):
    (line,) = problems({"train.batch_size": batch}, devices=8)
    assert line.startswith(f"train.batch_size is {batch}: ") and "8 devices" in line
    assert line.endswith(f"such as {nearest}")
    # Evaluation accepts any batch size for any number of devices.
    check_config(changed({"train.batch_size": nearest, "eval.batch_size": batch}), devices=8)


def test_a_batch_that_its_parts_and_pairs_do_not_divide():
    values = {"optimizer.accumulate_steps": 3, "train.cutmix": 1.0}
    (line,) = problems(values | {"train.batch_size": 40}, devices=2)
    assert "the 2 devices times optimizer.accumulate_steps=3 times the 2 images of a pair" in line
    assert line.endswith("such as 36")
    check_config(changed(values | {"train.batch_size": 36}), devices=2)


def test_all_that_is_wrong_is_said_at_once():
    lines = problems(
        {
            "optimizer.learning_rate": -1.0,
            "train.epochs": "many",
            "model.name": "regnet20_convlstmm",
            "train.batch_size": 30,
            "optimizer.nesterov": True,
            "optimizer.momentum": 0,
            "dataset.name": "folder",
            "dataset.mean": (0.5,),
        },
        devices=4,
    )
    starts = [line.split(" ")[0].rstrip(":") for line in lines]
    assert sorted(starts) == [
        "dataset.data_dir",
        "dataset.mean",
        "model",
        "optimizer.learning_rate",
        "optimizer.nesterov",
        "train.batch_size",
        "train.epochs",
    ]


@pytest.mark.fault("missing and unknown fields")
def test_missing_and_unknown_fields_are_named():
    config = changed({"train.bach_size": 64})
    del config["train"]["batch_size"], config["optimizer"]
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    lines = str(caught.value).split("\n")
    assert "train.batch_size is missing: start from configs/base.py" in lines
    assert "optimizer.momentum is missing: start from configs/base.py" in lines
    assert "train.bach_size is not a field of configs/base.py: remove it" in lines


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.lists(st.none() | st.text() | st.binary() | st.floats(), max_size=3),
    st.tuples(st.binary(), st.none()),
    st.dictionaries(st.integers() | st.sampled_from(["a", "learning_rate"]), st.integers(), max_size=2),
    st.builds(object),
    st.just(len),
)
# The types that a field accepts, by its default's type.
TAKES = {bool: bool, int: int, float: (int, float), str: str, tuple: (tuple, list), type(None): object}


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from(sorted(FIELDS)), VALUES)
def test_a_value_of_another_type_is_a_config_error_and_nothing_else(field, value):
    default = dict(flatten(DIGITS))[field]
    takes = TAKES[type(default)]
    right = isinstance(value, takes) and (not isinstance(value, bool) or takes in (bool, object))
    config = changed({field: value})
    if right or (field == "eval.checkpoint" and isinstance(value, int)):
        with contextlib.suppress(ConfigError):
            check_config(config)
    else:
        with pytest.raises(ConfigError) as caught:
            check_config(config)
        assert all(line.startswith(field) for line in str(caught.value).split("\n"))


# Resuming a run


def stored(values=()):
    """Returns a run's config.json: digits, resolved."""
    resolved = {"dataset.num_classes": 10, "dataset.image_size": 8, "dataset.mean": (0.3,), "dataset.std": (0.4,)}
    return json.loads(json.dumps(changed(resolved | dict(values)) | {"class_names": ["0", "1"]}))


def test_the_same_config_changes_nothing():
    assert changed_fields(stored(), DIGITS, resolved=False) == []
    assert changed_fields(stored(), stored(), resolved=True) == []


def test_a_config_of_an_earlier_version_means_the_defaults_and_what_is_no_field_is_ignored(caplog, logger):
    before = stored()
    del before["model"]["plugins"], before["optimizer"]["ema_decay"]
    before["model"]["overrides"] |= {"gone": None, "fast": True}
    assert changed_fields(before, DIGITS, resolved=False) == []
    (warning,) = caplog.messages
    (line,) = changed_fields(before, changed({"optimizer.ema_decay": 0.9}), resolved=False)
    assert line == "optimizer.ema_decay: 0.0 before, 0.9 now"
    assert "model.overrides.fast=True" in warning and "ignored" in warning


def test_a_changed_field_is_named_with_both_values():
    now = changed({"train.batch_size": 32, "optimizer.boundaries": (0.5,), "model.overrides.kernel": "dense"})
    assert sorted(changed_fields(stored(), now, resolved=False)) == [
        "model.overrides.kernel: None before, 'dense' now",
        "optimizer.boundaries: (0.5, 0.75) before, (0.5,) now",
        "train.batch_size: 64 before, 32 now",
    ]


def test_a_run_of_before_a_field_has_the_value_of_then():
    before = stored()
    del before["dataset"]["validation"]
    assert changed_fields(before, DIGITS, resolved=False) == []
    lines = changed_fields(before, changed({"dataset.validation": 0.1}), resolved=False)
    assert lines == ["dataset.validation: 0.0 before, 0.1 now"]


def test_fields_that_change_no_more_than_the_rounding_may_change():
    other = {"dataset.data_dir": "/elsewhere", "dataset.in_memory": "always", "eval.checkpoint": "last"}
    may_change = {name for name, field in FIELDS.items() if field.may_change}
    other |= {field: 7 for field in may_change if field not in other}
    assert changed_fields(stored(), changed(other), resolved=False) == []
    assert {"train.max_steps", "checkpoint.keep", "log.every_steps", "model.overrides.ops"} <= may_change
    computed = {"seed", "dtype", "model.name", "dataset.name", "dataset.augment", "train.batch_size"}
    assert not may_change & (computed | {field for field in FIELDS if field.startswith("optimizer.")})


@pytest.mark.parametrize(
    ("field", "other"),
    [("dataset.num_classes", 9), ("dataset.image_size", 16), ("dataset.mean", (0.5,)), ("dataset.std", (0.5,))],
)
def test_what_is_left_to_the_data_is_compared_once_it_is_resolved(field, other):
    resolved = {name: value for name, value in flatten(stored()) if name in FIELDS}
    assert changed_fields(stored(), DIGITS, resolved=False) == []
    (line,) = changed_fields(stored(), changed({field: other}), resolved=False)
    assert line == f"{field}: {resolved[field]!r} before, {other!r} now"
    assert changed_fields(stored(), changed(resolved), resolved=True) == []
    assert len(changed_fields(stored(), DIGITS, resolved=True)) == 4
    (line,) = changed_fields(stored(), changed(resolved | {field: other}), resolved=True)
    assert line.startswith(f"{field}: ")


def test_tuples_are_as_json_has_them():
    tuples = {"dataset.mean": (0.1, 0.2), "dataset.std": (0.3, 0.4), "dataset.augment": ("crop", "flip")}
    assert isinstance(stored(tuples)["dataset"]["mean"], list)
    assert changed_fields(stored(tuples), changed(tuples), resolved=False) == []
    for field, value in tuples.items():
        (line,) = changed_fields(stored(tuples), changed(tuples | {field: value[:1]}), resolved=False)
        assert line == f"{field}: {value!r} before, {value[:1]!r} now"
