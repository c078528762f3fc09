"""The paper's CIFAR models against their baselines on CIFAR-100, with its recipe: six models × three seeds.

    python -m regnet_flax.main --mode compare --config configs/compare_cifar100.py

The paper's table III: ResNet-20 31.72 %, RegNet-20 29.69 to 30.03 %; SE-ResNet-20 31.14 %, SE-RegNet-20 29.02 to
29.63 %.
"""

from configs import cifar100, compare_cifar10


def get_config():
    config = cifar100.get_config(compare_cifar10.MODELS[0])
    config.compare.models = compare_cifar10.MODELS
    return config
