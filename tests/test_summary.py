"""Parameters, multiply-adds and shapes, against sums written out by hand."""

import io

import pytest
from rich.console import Console

from regnet_flax import create_model
from regnet_flax.analysis.summary import summarize, table


def basic_stage(n, size, inputs, blocks):
    """Multiply-adds of a stage of plain basic blocks with shortcut B."""
    convolutions = 9 * n * inputs + 9 * n * n * (2 * blocks - 1)
    shortcut = n * inputs if n != inputs else 0
    return (convolutions + shortcut) * size * size


def fused(n, size, blocks, gates, weights):
    """What regulators of `weights` a gate and the 1×1 convolutions that fuse them add to a stage."""
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
    assert parts["stage1"].parameters == (6 * (9 * 256 + 32) if not gates else parts["stage1"].parameters), (
        "six convolutions and batch normalisations"
    )


def test_resnet50_at_224():
    """4.09 billion with torchvision's stride; He et al.'s placement at the first 1×1 convolution gives 3.86."""
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
