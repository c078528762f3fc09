"""A public project's recipe for your own photographs, of any size: DIR/train/<class>/* and DIR/test/<class>/*.

    python -m regnet_flax.main --config configs/rnn_photos.py --config.dataset.data_dir=DIR
    python -m regnet_flax.main --config configs/rnn_photos.py:regnety_400mf --config.dataset.data_dir=DIR \
        --config.dataset.image_size=224 --config.train.batch_size=32

If there is a DIR/val/ beside DIR/test/, it chooses the best checkpoint.

Training images are resized, then randomly flipped, rotated by up to 15 degrees, changed in colour and moved by up to
10 %; test images are only resized.
"""

from configs import rnn_cifar10


def get_config(model: str = "regnet20_convlstm"):
    config = rnn_cifar10.get_config(model)
    config.dataset.name = "folder"
    config.dataset.image_size = 32
    config.dataset.augment = ("flip", "rotate", "color", "translate")
    return config
