"""Every key of a run, with its default, its meaning and its unit.

The other files of this folder are small deltas of this one. Any key can be set on the command line:
`--config.optim.lr=1e-3`. A key that a chosen part does not use (data.toy while data.name is digits) is ignored.
"""

from ml_collections import ConfigDict


def section(**values) -> ConfigDict:
    """Return a section; its keys and their types are fixed from here on."""
    return ConfigDict(values)


def get_config() -> ConfigDict:
    """Return the defaults: MeanFlow on the 8x8 digits."""
    config = ConfigDict()
    config.seed = 0  # everything random in training is a pure function of it and of the step

    config.data = section(
        name="digits",  # digits | toy2d | image_folder | tfds
        path="",  # image_folder: the folder of pictures; tfds: its data folder, "" for the TFDS default
        image_size=8,  # pixels; pictures are resized and centre-cropped to it
        flip=False,  # mirror every other picture at random
        held_out_share=0.1,  # image_folder: share of the pictures of each class kept for evaluation
        dataset="cifar10",  # tfds: name of the data set
        split_train="train",  # tfds: the split to train on
        split_held_out="test",  # tfds: the split to evaluate against
        toy="checkerboard",  # toy2d: checkerboard | two_moons | eight_gaussians | spirals | gaussian
    )
    config.model = section(
        name="dit",  # dit (images) | mlp (vectors)
        size="digits",  # dit: digits | S | B | M | L | XL, a row of mf_jax.models.DIT_SIZES
        patch_size=4,  # dit: pixels, divides data.image_size
        depth=0,  # blocks; 0 = as the size says
        width=0,  # width of a token or layer; 0 = as the size says
        num_heads=0,  # dit: attention heads; 0 = as the size says
        time_conditioning="t,t-r",  # what the network is told: t,r | t,t-r | t,r,t-r | t-r
        dtype="float32",  # of the computation: float32 | bfloat16; parameters are float32
    )
    config.objective = section(
        name="meanflow",  # flow_matching | meanflow
        tangent="v01",  # meanflow: direction (dz, dr, dt) of du/dt; v00, v10, v11 are wrong on purpose
    )
    config.guidance = (
        section(  # v_g = omega v + kappa u(class) + (1 - omega - kappa) u(no class), in the target
            omega=1.0,  # factor of the sample's own velocity
            kappa=0.0,  # factor of the network's conditional velocity, in [0, 1); scale = omega / (1 - kappa)
            t_start=0.0,  # guide only for t in [t_start, t_end]
            t_end=1.0,  # the window's end, at least t_start
        )
    )
    config.weight = section(  # a row's squared error l weighs (l + c)^-p
        p=1.0,  # 0 = all rows alike
        c=0.01,  # above 0; keeps the weight of a small error finite
    )
    config.times = section(
        name="logit_normal",  # uniform | logit_normal
        t_mean=-0.4,  # logit_normal: mean of logit t
        t_std=1.0,  # logit_normal: its standard deviation
        r_mean=-0.4,  # logit_normal: mean of logit r; the larger of the two draws is called t
        r_std=1.0,  # logit_normal: its standard deviation
    )
    config.draws = section(
        instant_share=0.75,  # share of rows with r = t, in [0, 1]
        label_drop_share=0.1,  # share of all rows trained without their label, in [0, 1)
        label_drop="instant_rows",  # which rows may lose it: instant_rows (r = t) | any_row
    )
    config.train = section(
        num_steps=10_000,  # optimisation steps of the whole run
        batch_size=128,  # rows of a step, over all devices
        log_every_steps=100,  # steps between rows of metrics.jsonl, which average over them
    )
    config.optim = section(
        lr=1e-3,  # peak learning rate of adamw
        warmup_steps=0,  # steps of linear warm-up from 0
        schedule="constant",  # after warm-up: constant | cosine (to 0 at train.num_steps)
        b1=0.9,  # decay of the first moment
        b2=0.95,  # decay of the second moment
        weight_decay=0.0,  # decoupled
        clip_norm=0.0,  # clip gradients to this global norm; 0 = off
    )
    config.ema = section(
        decays=(0.9999,),  # one moving average of the parameters for each, all kept at once; each in [0, 1)
    )
    config.log = section(
        sample_every_steps=1000,  # steps between sample grids; 0 = only at the end
        progress=True,  # show progress on the terminal
    )
    config.checkpoint = section(
        every_steps=1000,  # steps between checkpoints; the last step and SIGTERM save one in any case
        keep=3,  # newest checkpoints kept
    )
    config.mesh = section(
        data=0,  # devices that split the batch alone; 0 = all that remain
        fsdp=1,  # devices that split the batch and the parameters
    )
    config.sample = section(
        num=100,  # samples to write, exactly
        steps=1,  # network evaluations of one sample: 1, 2, 4, ...
        times=(),  # or the time grid itself, e.g. (1.0, 0.5, 0.0); () = equal steps
        labels=(),  # classes, repeated over the samples, -1 = none; () = all classes in turn
        seed=0,  # of the noise
        ema="",  # which moving average: a decay of ema.decays, none = the raw parameters, "" = the first
        batch_size=256,  # samples computed at once; does not change them
    )
    config.eval = section(
        num_samples=2000,  # samples of each row of the table, exactly
        steps=(1, 2, 4, 8),  # one row of the table for each number of steps
        seed=1,  # of the noise
        ema="",  # as sample.ema
        batch_size=500,  # samples computed at once; does not change them
    )
    config.cache_dir = ".cache"  # folder of the evaluation's classifiers, shared by runs; "" = the workdir
    return config
