"""Every cell and block against the PyTorch reference, in float32 and float64, on random weights, states, statistics."""

import jax.numpy as jnp
import pytest

import torch_reference
from comparison import compare_block, compare_cell, named_within
from regnet_flax.models.regnet import CELLS, RegNet
from torch_reference import PROJ, RNN

# Stride and width change in the blocks without `inputs`; the shared regulator is the default.
FIRST, ALIKE = {"strides": 2, "inputs": 3}, {"inputs": 4}
# Each kind of block, cell, kernel, shortcut and stride.
BLOCKS = [
    ("basic", None, FIRST),
    ("basic", None, {"strides": 2, "inputs": 2, "shortcut": "A"}),
    ("basic", "convrnn", ALIKE),
    ("basic", "convgru", FIRST),
    ("basic", "convlstm", FIRST | {"se": True}),
    ("basic", "convlstm", ALIKE | {"kernel": "dense", "shared": False}),
    ("bottleneck", None, FIRST | {"bottleneck_stride": "3x3"}),
    ("bottleneck", None, {"inputs": 16, "se": True}),
    ("bottleneck", "convgru", FIRST | {"kernel": "dense", "shared": False}),
    ("bottleneck", "convlstm", {"inputs": 16}),
    ("basic", "convlstm", FIRST | {"style": PROJ, "kernel": "dense", "shared": False}),
    ("basic", "convrnn", FIRST | {"style": RNN, "kernel": "dense", "shared": False}),
    ("basic", "replacing_convgru", ALIKE | {"style": RNN, "kernel": "dense", "shared": False}),
    ("regnety", None, {"strides": 2, "inputs": 12}),
    ("regnety", None, {"inputs": 16}),
]
# Other combinations of their parts.
MIXED = [
    ("basic", None, ALIKE | {"se": True}),
    ("basic", "convrnn", FIRST | {"kernel": "dense"}),
    ("basic", "convgru", ALIKE | {"kernel": "dense", "shared": False}),
    ("basic", "convlstm", FIRST),
    ("basic", "convlstm", ALIKE | {"shared": False}),
    ("basic", "convlstm", ALIKE | {"kernel": "dense", "shortcut": "A"}),
    ("basic", "convrnn", FIRST | {"se": True}),
    ("basic", "convgru", ALIKE | {"se": True}),
    ("bottleneck", None, FIRST),
    ("bottleneck", "convrnn", FIRST),
    ("bottleneck", "convrnn", {"inputs": 16, "kernel": "dense"}),
    ("bottleneck", "convgru", {"inputs": 16}),
    ("bottleneck", "convlstm", FIRST),
    ("bottleneck", "convlstm", FIRST | {"kernel": "dense", "shared": False}),
    ("bottleneck", "convrnn", {"inputs": 16, "se": True}),
    ("bottleneck", "convgru", FIRST | {"se": True}),
    ("bottleneck", "convlstm", {"inputs": 16, "se": True}),
]
IN_FLOAT32 = [BLOCKS[4], BLOCKS[8], BLOCKS[13]]
STYLES = {id(PROJ): "proj", id(RNN): "rnn"}


def block_id(case):
    kind, regulator, options = case
    words = [kind, regulator or "plain"]
    for key, value in options.items():
        if key == "strides":
            words.append("stride2")
        elif key == "style":
            words.append(STYLES[id(value)])
        elif key == "shortcut":
            words.append(f"shortcut{value}")
        elif key == "bottleneck_stride":
            words.append(f"at{value}")
        elif key != "inputs":
            words.append({"shared": "own", "se": "se"}.get(key, str(value)))
    return "-".join(words)


def cell_tests():
    """Every cell in both types; float64 sees a wrong equation, float32 a wrong type, for which one cell does."""
    for name in CELLS:
        for kernel in ("separable", "dense"):
            for dtype in ("float32", "float64"):
                by_others = dtype == "float32" and (name, kernel) != ("convlstm", "separable")
                # test_networks.py compares DIANet; the replacing ConvGRU has none but dense kernels.
                if name != "dia" and (name, kernel) != ("replacing_convgru", "separable"):
                    yield pytest.param(name, kernel, dtype, marks=pytest.mark.thorough if by_others else ())


@pytest.mark.parametrize("name, kernel, dtype", list(cell_tests()))
def test_cell(name, kernel, dtype, parity):
    n = 3
    if name == "replacing_convgru":
        theirs, replaces = torch_reference.RNNProjectConvGRU(n), True
    else:
        theirs, replaces = torch_reference.REGULATORS[name](n, kernel), False
    model = RegNet(stage_sizes=(1,), width=n, regulator=name, kernel=kernel, replace=replaces)
    place, prefix = (["stage1", "block1", "regulator"], "layer1.0.rnn.")
    if not replaces:
        place, prefix = ["stage1", "regulator"], "regulator1."
    names = named_within(model, place, prefix)
    with parity(dtype) as device:
        compare_cell(CELLS[name](n, kernel, dtype=jnp.dtype(dtype)), theirs, names, dtype, device)


def block_tests():
    """Tests every block in both dtypes; float64 shows a wrong equation, float32 a wrong dtype: three blocks suffice."""
    for case in [*BLOCKS, *MIXED]:
        marks = pytest.mark.thorough if case in MIXED else ()
        yield pytest.param(case, "float64", id=f"{block_id(case)}-float64", marks=marks)
        marks = () if case in IN_FLOAT32 else pytest.mark.thorough
        yield pytest.param(case, "float32", id=f"{block_id(case)}-float32", marks=marks)


@pytest.mark.parametrize("case, dtype", list(block_tests()))
def test_block(case, dtype, parity):
    with parity(dtype) as device:
        compare_block(*case, dtype, device)
