"""Where a regulator helps: RegNet-20 with a ConvLSTM in some of its stages, on CIFAR-10; with none it is ResNet-20.

    python -m regnet_flax.main --mode compare --config configs/compare_placement.py

The paper finds that a regulator helps most in the early stages.
"""

from configs import cifar10

STAGES = ((), (1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3))


def get_config():
    config = cifar10.get_config("regnet20_convlstm")
    config.compare.models = tuple(f"regnet20_convlstm regulated_stages={stages}" for stages in STAGES)
    return config
