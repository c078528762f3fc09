"""The paper's ImageNet recipe (arXiv 2101.00590, section IV), for any model of the ImageNet family.

    python -m regnet_flax.main --config configs/imagenet.py --config.dataset.data_dir=DIR
    python -m regnet_flax.main --config configs/imagenet.py:regnet50_convgru
    python -m regnet_flax.main --config configs/imagenet.py:resnet101,modern --config.dtype=bfloat16

`modern` uses the techniques of torchvision's reference training: warm-up and cosine, label smoothing, mixup, cutmix,
TrivialAugment, random erasing, averaged weights, and no decay of biases and batch normalisations. Theirs has 600
epochs, a weight decay of 2e-5, crops of 176 pixels, erases one image in ten, and has a rate of 0.5 for batches of 1024;
this one has 120 epochs, 1e-4, 224 pixels, one image in two, and the same rate per image.
If memory is short: --config.optimizer.accumulate_steps=4, --config.model.overrides.remat=True.
"""

from configs import base


def get_config(model: str = "regnet50_convlstm"):
    model, _, recipe = model.partition(",")
    if recipe not in ("", "modern"):
        raise ValueError(f"the recipe is {recipe!r}: it must be modern, as in configs/imagenet.py:{model},modern")
    config = base.get_config()
    config.model.name = model
    config.dataset.name = "imagenet2012"
    config.dataset.image_size = 224
    config.dataset.augment = ("random_resized_crop", "flip")
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (0.229, 0.224, 0.225)
    config.train.batch_size = 256
    config.train.epochs = 100
    config.optimizer.boundaries = (30, 60, 90)
    if recipe == "modern":
        config.train.epochs = 120
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_epochs = 5.0
        config.optimizer.label_smoothing = 0.1
        config.optimizer.ema_decay = 0.9999
        config.optimizer.learning_rate = 0.125
        config.optimizer.decayed = "kernels"
        config.dataset.augment = ("random_resized_crop", "flip", "trivialaugment", "erase")
        config.train.mixup = 0.2
        config.train.cutmix = 1.0
    return config
