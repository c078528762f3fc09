"""benchmarks/torch_peer.py, the PyTorch code of the benchmarks, computes the same as the reference."""

import sys

import pytest
import torch
import torch.nn.functional as F

import torch_reference
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import torch_peer

SIZES = {"width": 4, "counts": (2, 1)}  # blocks with and without a state
MODELS = [("resnet20", "per gate")]
MODELS += [(f"regnet20_{cell}", form) for cell in torch_peer.CELLS for form in torch_peer.FORMS]


def outcome(network, images, labels):
    """Returns logits in training and evaluation, each parameter's gradient, and the running statistics."""
    logits = network.train()(images)
    F.cross_entropy(logits, labels).backward()
    found = {"training": logits.detach()} | {name: p.grad for name, p in network.named_parameters()}
    found |= {name: b for name, b in network.named_buffers() if b.is_floating_point()}
    with torch.inference_mode():
        return found | {"evaluation": network.eval()(images)}


@pytest.mark.parametrize(("name", "form"), MODELS)
def test_the_peer_equals_the_reference(name, form):
    torch.manual_seed(0)
    reference = torch_reference.build(name, **SIZES).double()
    peer = torch_peer.build(name, form=form, **SIZES).double()
    peer.load_state_dict(reference.state_dict())
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    expected = outcome(reference, images, labels)
    layout = {"memory_format": torch.channels_last}
    found = outcome(peer.to(**layout), images.contiguous(**layout), labels)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key] - array).norm() <= 1e-10 * array.norm() and array.norm() > 0, key
