"""The comparisons with PyTorch fail if any one equation is broken."""

import flax.linen as nn
import jax
import pytest
import torch

import comparison
from regnet_flax.models.blocks import Block
from regnet_flax.models.ops import plain
from regnet_flax.models.regulators import ConvGRU, ConvLSTM
from torch_reference import PROJ

FIRST = {"strides": 2, "inputs": 3}


@pytest.fixture(autouse=True)
def errors_of_their_own(monkeypatch):
    monkeypatch.setattr(comparison, "ERRORS", {})


def block(kind="basic", regulator=None, **options):
    with jax.enable_x64(True):
        comparison.compare_block(kind, regulator, FIRST | options, "float64", torch.device("cpu"))


def network(name, **options):
    with jax.enable_x64(True):
        comparison.compare_network(name, options, "float64", torch.device("cpu"), 8)


def test_gate_order(monkeypatch):
    """The input and forget gates are swapped."""
    convolve = ConvLSTM.convolve

    def exchanged(self, *arguments):
        i, f, o, g = convolve(self, *arguments)
        return f, i, o, g

    monkeypatch.setattr(ConvLSTM, "convolve", exchanged)
    with pytest.raises(AssertionError, match="outputs, evaluation, float64: X is off"):
        block(regulator="convlstm", style=PROJ, kernel="dense", shared=False)


def test_update_gate(monkeypatch):
    """H' = z⊙H + (1 − z)⊙H̃."""
    step = ConvGRU.step

    def exchanged(self, x, state, weights):
        (new,), gates = step(self, x, state, weights)
        return (state[0] + gates["h"] - new,), gates

    monkeypatch.setattr(ConvGRU, "step", exchanged)
    with pytest.raises(AssertionError, match="is off"):
        block(regulator="convgru")


def test_h_not_normalised(monkeypatch):
    """H is passed on unchanged; its batch normalisation exists, but has no effect."""
    regulate = Block.regulate

    def raw(self, x, state, shared):
        normalised = regulate(self, x, state, shared)
        cell = self.cell(parent=None)
        return (cell.apply({"params": shared}, x, state)[0][0], *normalised[1:])

    monkeypatch.setattr(Block, "regulate", raw)
    with pytest.raises(AssertionError, match="is off"):
        block(regulator="convrnn")


@pytest.mark.parametrize("where", ["blocks.BatchNorm", "correction"])
def test_variance(where, monkeypatch):
    """The unbiased variance normalises, or the running variance is compared without its correction."""
    if where == "correction":
        check = comparison.check_statistics

        def uncorrected(row, found, before, after, counts):
            check(row, found, before, after, dict.fromkeys(counts, 1e9))

        monkeypatch.setattr(comparison, "check_statistics", uncorrected)
        with pytest.raises(AssertionError, match="running_var is off"):
            block()
        return
    statistics = plain.statistics

    def unbiased(x, axis_name):
        mean, variance = statistics(x, axis_name)
        n = x.size // x.shape[-1]
        return mean, variance * n / (n - 1)

    monkeypatch.setattr(plain, "statistics", unbiased)
    with pytest.raises(AssertionError, match="outputs, training, float64: X is off"):
        block()


def test_same_padding(monkeypatch):
    def same(self, x, features, size, strides, name, dilation=1):
        return nn.Conv(features, (size, size), strides, padding="SAME", use_bias=False, dtype=self.dtype, name=name)(x)

    monkeypatch.setattr(Block, "_conv", same)
    with pytest.raises(AssertionError, match="outputs, evaluation, float64: X is off"):
        block()


def test_a_regulator_a_block_instead_of_one_a_stage(monkeypatch):
    """Equal weights per block give equal outputs, so only the gradient differs: here it is the first block's alone."""
    call = nn.scan

    def stop(target, *arguments, **options):
        class Stopped(target):
            def regulate(self, x, state, shared):
                return super().regulate(x, state, jax.lax.stop_gradient(shared))

        return call(Stopped, *arguments, **options)

    monkeypatch.setattr(nn, "scan", stop)
    with pytest.raises(AssertionError, match="networks, gradients, float64: regulator1"):
        network("regnet20_convrnn", width=4, stage_sizes=(2,))


def test_a_regulator_a_block_by_its_names(monkeypatch):
    create = comparison.create
    monkeypatch.setattr(comparison, "create", lambda *a, **more: create(*a, **more).clone(share_regulator=False))
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.regulator"):
        network("regnet20_convrnn", width=4, stage_sizes=(2,))
