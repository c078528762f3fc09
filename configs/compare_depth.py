"""How deep a ResNet must be to match a RegNet: RegNet-20, 32 and 56 against ResNet-20 to 110, on CIFAR-10.

    python -m regnet_flax.main --mode compare --config configs/compare_depth.py

He et al. report 8.75, 7.51, 6.97 and 6.43 % error for ResNet-20, 32, 56 and 110.
"""

from configs import cifar10

RESNETS = tuple(f"resnet{depth}" for depth in (20, 32, 56, 110))
REGNETS = tuple(f"regnet{depth}_convlstm" for depth in (20, 32, 56))


def get_config():
    config = cifar10.get_config(RESNETS[0])
    config.compare.models = RESNETS + REGNETS
    return config
