"""The paper's CIFAR models against their baselines on CIFAR-10, by its recipe: six models × three seeds.

    python -m regnet_flax.main --mode compare --config configs/compare_cifar10.py

The paper reports up to 1.51 points less error than the baseline with a regulator; He et al., 8.75 % for ResNet-20.
"""

from configs import cifar10

MODELS = (
    "resnet20",
    "se_resnet20",
    "regnet20_convrnn",
    "regnet20_convgru",
    "regnet20_convlstm",
    "se_regnet20_convlstm",
)


def get_config():
    config = cifar10.get_config(MODELS[0])
    config.compare.models = MODELS
    return config
