"""The CIFAR recipe on a folder of your own images: DIR/train/<class>/* and DIR/test/<class>/*, of any size.

python -m regnet_flax.main --config configs/folder.py --config.dataset.data_dir=DIR
"""

from configs import cifar10


def get_config(model: str = "regnet20_convlstm"):
    config = cifar10.get_config(model)
    config.dataset.name = "folder"
    config.dataset.image_size = 32
    return config
