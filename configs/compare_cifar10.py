"""The paper's CIFAR models against their baselines on CIFAR-10, with its recipe: six models × three seeds.

    python -m regnet_flax.main --mode compare --config configs/compare_cifar10.py

The paper's table III: ResNet-20 8.38 %, RegNet-20 7.28 to 7.60 %; SE-ResNet-20 8.02 %, SE-RegNet-20 6.98 to 7.55 %.
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
