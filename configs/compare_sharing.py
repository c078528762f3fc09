"""The cost of sharing a regulator and of separable gates: one regulator per stage or per block, separable or dense.

    python -m regnet_flax.main --mode compare --config configs/compare_sharing.py

On CIFAR-10. The first model, shared and separable, is the paper's as we read it; ResNet-20 comes last.
"""

from configs import cifar10


def get_config():
    config = cifar10.get_config("regnet20_convlstm")
    config.compare.models = (
        "regnet20_convlstm",
        "regnet20_convlstm share_regulator=False",
        "regnet20_convlstm kernel=dense",
        "regnet20_convlstm share_regulator=False kernel=dense",
        "resnet20",
    )
    return config
