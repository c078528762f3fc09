"""Every field of a config. The other configs start from this one and change it.

Override a field on the command line with --config.train.batch_size=64; a tuple with --config.dataset.mean='(0.5,)'.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()

    config.seed = 0  # of the initial weights, the order of the examples and their augmentation
    config.dtype = "float32"  # of the arithmetic, or "bfloat16"; parameters and batch statistics are float32

    config.model = model = config_dict.ConfigDict()
    model.name = "regnet20_convlstm"  # see `regnet_flax.list_models()`; any CIFAR depth 6m+2 is accepted
    model.init_from = ""  # a .safetensors or .pth file of weights by PyTorch's names to start from, or to evaluate
    model.new_head = False  # leave that file's head out, as for another number of classes
    model.overrides = overrides = config_dict.ConfigDict()  # None: the model's own default
    overrides.kernel = config_dict.placeholder(str)  # of the regulators: "separable" or "dense"
    overrides.share_regulator = config_dict.placeholder(bool)  # one for all blocks of a stage, or one each
    overrides.regulated_stages = config_dict.placeholder(tuple)  # such as (1, 2); None: all
    overrides.shortcut = config_dict.placeholder(str)  # "B", a 1×1 convolution, or "A", without parameters
    overrides.width = config_dict.placeholder(int)  # channels of the first stage
    overrides.bottleneck_stride = config_dict.placeholder(str)  # "1x1", or "3x3" as torchvision has it (ResNets only)
    overrides.init = config_dict.placeholder(str)  # initial values: "paper" or "torch"
    overrides.unroll = config_dict.placeholder(int)  # blocks a step of nn.scan; None: all on a CPU, 1 elsewhere
    overrides.remat = config_dict.placeholder(bool)  # recompute each block in the backward pass, to save memory
    overrides.ops = config_dict.placeholder(str)  # "plain", "cpu" or "gpu", see create_model; None: by the devices

    config.dataset = dataset = config_dict.ConfigDict()
    dataset.name = "digits"  # "digits", "cifar10", "cifar100", "imagenet2012", "folder" or "synthetic"
    dataset.data_dir = ""  # TFDS's data_dir ("": TFDS's own default), or the folder with train/ and test/ (and val/)
    dataset.num_classes = 0  # 0: from the data
    dataset.validation = 0.0  # training images held out to choose "best" by: so many (5000), or a fraction (0.1)
    dataset.in_memory = "auto"  # "always": it lies on the device as uint8; "never": it is streamed; "auto" streams
    # imagenet2012, folders of more than 4 GiB once decoded, and what has "random_resized_crop" in `augment`
    dataset.workers = 0  # processes that decode what is streamed; 0: threads of this one
    dataset.prefetch = 2  # batches that each of these processes (or this one) holds ready
    dataset.strict = False  # an image that does not decode is an error, instead of being listed and left out
    dataset.image_size = 0  # images are resized to this height and width; 0: as they are
    # Of training images, in this order: "crop", "flip", "rotate", "color", "translate", "trivialaugment",
    # "randaugment"; last "erase"; streamed, "random_resized_crop" may come first
    dataset.augment = ()
    dataset.mean = ()  # of each channel, for pixels in 0…1; (): from the training images
    dataset.std = ()  # likewise

    config.train = train = config_dict.ConfigDict()
    train.batch_size = 128  # over all devices
    train.epochs = 200
    train.max_steps = 0  # stop after so many steps; 0: no bound. The schedule does not depend on it
    train.steps_per_call = 0  # steps in one compiled call; 0: 1 on a CPU, 50 elsewhere
    train.batch_norm = "sync"  # statistics over the batch of all devices; "local": over each device's part
    train.mixup = 0.0  # images mixed in pairs by a share drawn from Beta(mixup, mixup), such as 0.2; 0: none
    train.cutmix = 0.0  # boxes exchanged in pairs, of an area drawn likewise, such as 1.0; where both, one at random

    config.optimizer = optimizer = config_dict.ConfigDict()
    optimizer.name = "sgd"  # "sgd", "adamw" or "lamb"
    optimizer.learning_rate = 0.1
    optimizer.momentum = 0.9  # of "sgd"
    optimizer.nesterov = False  # of "sgd"
    optimizer.betas = (0.9, 0.999)  # of "adamw" and "lamb"
    optimizer.weight_decay = 1e-4  # L2 for "sgd"; decoupled, times the learning rate, for "adamw" and "lamb"
    optimizer.decayed = "all"  # which weights decay: "all", or "kernels", without biases and normalisations
    optimizer.schedule = "step"  # "step", "cosine" or "constant"
    optimizer.boundaries = (0.5, 0.75)  # of "step": epochs, or fractions of the run if below 1
    optimizer.decay = 0.1  # of "step": the factor at each boundary
    optimizer.warmup_epochs = 0.0  # the rate rises linearly over so many epochs first
    optimizer.label_smoothing = 0.0
    optimizer.clip_norm = 0.0  # the gradient's largest norm; 0: no bound
    optimizer.accumulate_steps = 1  # parts that a batch goes through in, to save memory, each normalised by itself
    optimizer.ema_decay = 0.0  # of averages of weights and batch statistics, to be evaluated and exported; 0: none

    config.eval = evaluation = config_dict.ConfigDict()
    evaluation.batch_size = 500  # over all devices, rounded up to a multiple of them
    evaluation.every_epochs = 1  # 0: never
    evaluation.checkpoint = "best"  # for --mode eval: "best", "last" or a step

    config.log = config_dict.ConfigDict()
    config.log.every_steps = 100  # 0: only where it evaluates

    config.checkpoint = checkpoint = config_dict.ConfigDict()
    checkpoint.every_steps = 0  # 0: every epoch
    checkpoint.keep = 2  # the newest
    checkpoint.keep_best = 1  # and those of the highest test accuracy

    config.predict = predict = config_dict.ConfigDict()  # for --mode predict, by the checkpoint eval.checkpoint
    predict.images = ""  # a file, a folder, or a glob of them
    predict.top = 5  # classes shown for each image
    predict.json = False  # JSON on standard output instead of a table; all else is then said on standard error
    config.compare = compare = config_dict.ConfigDict()  # for --mode compare
    compare.models = ()  # the baseline first; options after the name: "regnet20_convgru kernel=dense"
    compare.seeds = (0, 1, 2)  # of each model, trained together
    # Their steps: "always" in one by vmap, "never", taking turns, in the memory of one; "auto": by turns on a CPU
    compare.together = "auto"

    config.export = export = config_dict.ConfigDict()  # for --mode export, of the checkpoint eval.checkpoint
    export.format = "safetensors"  # or "torch", weights by PyTorch's names; "stablehlo", the model as a program
    export.path = ""  # "": weights.safetensors, weights.pth or model.stablehlo in the workdir
    return config
