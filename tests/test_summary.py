"""Parameters, multiply-adds and shapes, against sums by hand and PyTorch's counts of the reference."""

import io
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import torch_networks
import torch_reference
from helpers import error_of, run_program
from regnet_flax import create_model, list_models, main
from regnet_flax.analysis.summary import summarize, table

TABLE = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "models_table.py"


def basic_stage(n, size, inputs, blocks):
    """Returns the multiply-adds of a stage of plain basic blocks with shortcut B."""
    convolutions = 9 * n * inputs + 9 * n * n * (2 * blocks - 1)
    shortcut = n * inputs if n != inputs else 0
    return (convolutions + shortcut) * size * size


def fused(n, size, blocks, gates, weights):
    """Returns what regulators with `weights` per gate and the fusing 1×1 convolutions add to a stage."""
    return (gates * weights + 2 * n * n) * size * size * blocks


@pytest.mark.parametrize(
    "name, options, gates, weights",
    [
        ("resnet20", {}, 0, None),
        ("regnet20_convrnn", {}, 1, lambda n: 11 * n),
        ("regnet20_convgru", {}, 3, lambda n: 11 * n),
        ("regnet20_convlstm", {"share_regulator": False}, 4, lambda n: 11 * n),
        ("regnet20_convlstm", {"kernel": "dense"}, 4, lambda n: 18 * n * n),
    ],
)
def test_cifar_networks(name, options, gates, weights):
    parts = {part.name: part for part in summarize(create_model(name, **options), (32, 32, 3))}
    assert list(parts) == ["conv1", "bn1", "stage1", "stage2", "stage3", "head"]
    assert parts["conv1"].multiply_adds == 27 * 16 * 32 * 32
    assert parts["head"].multiply_adds == 640 and parts["head"].output == (10,)
    for stage, n, size, inputs in ((1, 16, 32, 16), (2, 32, 16, 16), (3, 64, 8, 32)):
        expected = basic_stage(n, size, inputs, 3)
        if gates:
            expected += fused(n, size, 3, gates, weights(n))
        assert parts[f"stage{stage}"].multiply_adds == expected
        assert parts[f"stage{stage}"].output == (size, size, n)
    parameters = 6 * (9 * 256 + 32)  # six convolutions and batch normalisations
    if gates:  # also a fusing convolution and two batch normalisations per block, and the biases of the gates
        regulators = 1 if options.get("share_regulator", True) else 3
        parameters += 3 * (2 * 256 + 2 * 32) + regulators * gates * (weights(16) + 16)
    assert parts["stage1"].parameters == parameters


def test_resnet50_at_224():
    """4.09 billion with torchvision's stride, 3.86 with He et al.'s, in the first 1×1 convolution."""
    for stride, billions in (("3x3", 4.09), ("1x1", 3.86)):
        parts = summarize(create_model("resnet50", num_classes=1000, bottleneck_stride=stride), (224, 224, 3))
        assert sum(part.multiply_adds for part in parts) / 1e9 == pytest.approx(billions, abs=0.005)
        assert sum(part.parameters for part in parts) == 25_557_032


def test_squeeze_and_excitation_is_counted():
    plain, se = (
        {part.name: part for part in summarize(create_model(name), (32, 32, 3))} for name in ("resnet20", "se_resnet20")
    )
    assert se["stage3"].multiply_adds - plain["stage3"].multiply_adds == 3 * 2 * 64 * 4


def test_table_has_the_totals():
    out = Console(file=io.StringIO(), width=100)
    out.print(table(summarize(create_model("resnet20"), (32, 32, 3)), "resnet20"))
    text = out.file.getvalue()
    assert "272,474" in text and "40,813,184" in text and "8×8×64" in text


@pytest.mark.parametrize(
    "name, options, size",
    [
        ("resnet20", {"shortcut": "A"}, 32),
        pytest.param("resnet56", {}, 32, marks=pytest.mark.thorough),
        ("regnet32_convrnn", {"kernel": "dense"}, 32),
        ("regnet20_convgru", {}, 32),
        ("regnet44_convlstm", {"share_regulator": False, "regulated_stages": (1, 3)}, 32),
        ("se_regnet20_convlstm", {"width": 8}, 20),
        ("se_resnet34", {}, 224),
        ("resnet50", {"bottleneck_stride": "3x3"}, 224),
        pytest.param("regnet50_convlstm", {}, 224, marks=pytest.mark.thorough),
        ("regnet_proj_cifar", {}, 32),
        pytest.param("regnet_proj_imagenet", {}, 224, marks=pytest.mark.thorough),
        ("resnet_rnn20_convrnn", {}, 32),
        ("resnet_rnn20_convgru", {}, 32),
        ("regnety_400mf", {}, 224),
    ],
)
def test_counts_are_those_of_torch(name, options, size):
    """Compares with the reference, run only on shapes: parameters, multiply-adds (half of PyTorch's FLOPs), stages."""
    shapes = {}

    def keep(module_name, _, inputs, output):
        shapes[module_name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

    with torch.device("meta"):
        theirs = torch_reference.build(name, num_classes=10, **options)
        for module_name, module in theirs.named_modules():
            if re.fullmatch(r"layer\d\.\d+|trunk_output\.block\d", module_name):
                module.register_forward_hook(lambda *args, at=module_name: keep(at, *args))
        with FlopCounterMode(display=False) as counter:
            theirs(torch.empty(1, 3, size, size))
    parts = summarize(create_model(name, num_classes=10, **options), (size, size, 3))
    assert 2 * sum(part.multiply_adds for part in parts) == counter.get_total_flops()
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in theirs.parameters())
    outputs = {part.name: part.output for part in parts}
    for module_name, (_, channels, height, width) in shapes.items():  # a stage's last block writes last
        stage = re.search(r"(?:layer|trunk_output\.block)(\d)", module_name)[1]
        if name == "regnety_400mf":
            stage += f"_block{(1, 3, 6, 6)[int(stage) - 1]}"
        assert outputs[f"stage{stage}"] == (height, width, channels), module_name
    assert shapes


# test_networks.py compares its own families.
EVERY = [name for name in list_models() if torch_networks.reference(name) is None]
SUMMARISED = ["resnet110", "se_regnet20_convgru", "regnet18_convlstm", "resnet_rnn20_convrnn", "regnety_400mf"]


@pytest.mark.parametrize("names", [SUMMARISED, pytest.param(EVERY, marks=pytest.mark.thorough)], ids=len)
def test_summary_of_every_model(names, capsys):
    """`--mode summary` at the recipe's input size: parameters equal the reference's, stages halve the image."""
    for name in names:
        model = create_model(name)
        imagenet = getattr(model, "stem", "imagenet") == "imagenet"
        size, classes = (224, 1000) if imagenet else (32, 10)
        recipe = "imagenet" if imagenet else "cifar10"
        assert main.main(["--mode=summary", f"--config=configs/{recipe}.py:{name}"]) == 0
        out = " ".join(capsys.readouterr().out.split())  # a long title is wrapped
        with torch.device("meta"):
            parameters = sum(p.numel() for p in torch_reference.build(name, num_classes=classes).parameters())
        assert f"{name}, images of {size}×{size}×3, {classes} classes" in out and f"{parameters:,}" in out
        if hasattr(model, "stage_sizes"):
            first = size // {"cifar": 1, "cifar_pool": 2, "imagenet": 4}[model.stem]
            for stage in range(len(model.stage_sizes)):
                n = (64 if imagenet else 16) * 2**stage * (4 if model.block == "bottleneck" else 1)
                assert f"{first >> stage}×{first >> stage}×{n}" in out


def test_a_plugin_that_cannot_be_imported_is_one_line():
    line = error_of(run_program("--mode=models", "--config.model.plugins=('nowhere',)"), 2)
    assert "model.plugins" in line and "nowhere" in line


@pytest.mark.slow
def test_the_pages_table_is_up_to_date():
    subprocess.run([sys.executable, TABLE, "--check"], check=True, timeout=300)


@pytest.mark.thorough
def test_the_results_are_those_of_their_raw_files():
    subprocess.run([sys.executable, TABLE.with_name("results_table.py"), "--check"], check=True, timeout=300)


@pytest.mark.slow
def test_a_table_that_is_not_is_seen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TABLE.parent)
    page, whole = tmp_path / "models.md", (TABLE.parent.parent / "docs" / "models.md").read_text()
    page.write_text(whole.replace("972,250 · 36.1", "972,250 · 36.2"))
    monkeypatch.setattr(sys, "argv", [str(TABLE), "--check", "--file", str(page)])
    with pytest.raises(SystemExit, match="out of date"):
        runpy.run_path(str(TABLE), run_name="__main__")
    monkeypatch.setattr(sys, "argv", [str(TABLE), "--write", "--file", str(page)])
    runpy.run_path(str(TABLE), run_name="__main__")
    assert page.read_text() == whole
