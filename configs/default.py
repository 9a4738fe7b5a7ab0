"""Every key of a run, with its default, its meaning and its unit.

The other files of this folder are small deltas of this one. Any key can be set on the command line:
`--config.optim.lr=1e-3`. A key that a chosen part does not use is ignored, as data.toy for digits,
or refused where that would mislead.
"""

from ml_collections import ConfigDict

DEFAULTS = dict(
    seed=0,  # everything random in training is a pure function of it and of the step
    data=dict(
        # digits | toy2d | image_folder | tfds | openml | latents (made by --mode=prepare), and
        name="digits",  # arrays (vectors, signals or pictures in an .npz or .npy file)
        # arrays: their file; image_folder, latents: their folder; tfds, openml: the folder that
        path="",  # they keep data in, "" for the usual one
        image_size=8,  # pixels; pictures are resized and centre-cropped to it
        channels=0,  # image_folder: 1 grey, 3 colour; 0 = grey if the pictures are
        background="white",  # image_folder: colour behind transparent pixels
        flip=False,  # mirror every other picture at random
        augment="none",  # edm: mirror, scale, stretch, shift pictures and tell it; none
        class_order="number",  # of classes that are all numbers: number | name (10 before 2)
        held_out_share=0.1,  # image_folder (of each class), arrays: share kept for evaluation
        dataset="cifar10",  # tfds: name of the data set; openml: mnist_784 | Fashion-MNIST
        split_train="train",  # tfds: the split to train on
        split_held_out="test",  # tfds: the split to evaluate against
        toy="checkerboard",  # checkerboard | two_moons | eight_gaussians | spirals | gaussian
        autoencoder="sd-vae-ft-mse",  # latents: the autoencoder, by its published name or as a path
        copy_to="",  # latents: folder of each host to copy them to first; a bucket needs it
        latent_mean=(0.0,),  # latents: taken from each, one number or one a channel
        latent_std=(1 / 0.18215,),  # latents: each is divided by it then; above 0
    ),
    prepare=dict(  # --mode=prepare: from pictures to the latents in data.path
        input="",  # folder of class folders, .tar or a folder of them, tfds:NAME (split_train)
        shards=128,  # files that the latents are spread over, whatever the number of processes
        batch_size=32,  # pictures encoded at once on a device; changes rounding at most
        max_bad=100,  # unreadable pictures that a process skips and names; one more stops it
        latents=True,  # write latents; False = only the reference
        reference="",  # also write statistics by eval.inception to this .npz file; "" = none
        reference_pictures=False,  # keep 10,000 pictures in it, for ADM's evaluator
        process_index=0,  # which part of the work this process takes, in [0, process_count)
        process_count=0,  # processes that share the work; 0 = the JAX job's own count and index
    ),
    model=dict(  # dit and mlp take signals too, and a condition of numbers
        name="dit",  # dit | in_context_dit | unet (images), mlp (vectors), affine | low_rank
        size="digits",  # digits | S | B | M | L | XL; in_context_dit: pixel_B | pixel_L | pixel_H
        patch_size=4,  # dit, in_context_dit: pixels, or places of a signal; divides their number
        depth=0,  # blocks; 0 = as the size says
        width=0,  # width of a token or layer; 0 = as the size says
        num_heads=0,  # dit, in_context_dit: attention heads; 0 = as the size says
        # t,r | t,t-r | t,r,t-r | t-r | t; dit: t|r and t,log2 (of the number of steps t - r) too;
        time_conditioning="t,t-r",  # in_context_dit: t-r
        r_blocks=0,  # dit with t|r: the last blocks, told r instead of t; 0 = a quarter of them
        norm="layer",  # dit: layer | rms (of tokens, modulation, queries and keys)
        logit_power=-0.5,  # dit: attention takes products times a head's features to this power
        told_guidance=False,  # dit: it is told 1 / omega, which it divides by; see draws.omega_max
        second_head=True,  # in_context_dit: a second head for the velocity, in training only
        head_depth=0,  # in_context_dit: blocks of each head; 0 = as the size says
        bottleneck=0,  # in_context_dit: width between two patch embeddings; 0 = as the size says
        positions="",  # in_context_dit: sequence | grid; "" = as the size says
        prediction="velocity",  # of the network: velocity | data, u = (z - x) / max(t, t_clip)
        t_clip=0.05,  # prediction=data: smallest time divided by, in (0, 1)
        channels=128,  # unet: channels of the first convolution
        channel_multipliers=(2, 2, 2),  # unet: of each level; each after the first halves the image
        num_blocks=4,  # unet: residual blocks of a level
        attention_resolutions=(16,),  # unet: heights, in pixels, of the levels with attention
        dropout=0.0,  # unet: rate, in [0, 1)
        rank=8,  # low_rank: rank of the matrix
        dtype="float32",  # of the computation: float32 | bfloat16; parameters are float32
        attention="xla",  # dits: xla | plain (all at once on CPUs too) | fused (GPU, TPU kernels)
        remat="none",  # dits: recompute for the gradient: none | block | dots (all but products)
        scan=False,  # dits: one loop over the blocks, whose parameters are stacked; compiles fast
    ),
    objective=dict(
        # meanflow | improved_meanflow | pixel_meanflow | alpha_flow | split_meanflow | shortcut |
        name="meanflow",  # terminal_velocity | flow_matching, or one of your own
        derivative="jvp",  # of u in t, where the objective has one: jvp | backward | central
        derivative_delta=0.0,  # backward, central: step in t, in (0, 1); 0 = as published
        ramp_steps=0,  # meanflow: first steps in which the factor of du/dt rises from 0 to 1
        to_data_steps=0,  # meanflow: first steps in which ever fewer rows with r < t have r = 0
        tangent="v01",  # meanflow: direction (dz, dr, dt) of du/dt; v00, v10, v11 are wrong
        velocity="head",  # improved_meanflow, pixel_meanflow: of the network: head | boundary
        annealing="sigmoid",  # alpha_flow: how alpha moves: sigmoid | exponential
        alpha_start=1.0,  # alpha_flow: first alpha, in [0, 1]; 1 is flow matching
        alpha_end=0.0,  # alpha_flow: last alpha, in [0, 1]; 0 is meanflow
        anneal_from=0,  # alpha_flow: step at which alpha starts to move
        anneal_to=10_000,  # alpha_flow: step at which it has arrived
        sharpness=25.0,  # alpha_flow: of the sigmoid
        derivative_below=5e-3,  # alpha_flow: meanflow's form for a smaller alpha; 0 = never
        min_gap=0.0,  # alpha_flow: smallest step in t, in [0, 1)
        target_clip=4.0,  # alpha_flow, shortcut: bound of a finite step's target; inf = none
        error_of="velocity",  # alpha_flow: of the step divided by alpha: velocity, or not: step
        interval_factor=1.0,  # alpha_flow: of rows with r < t in the loss, above 0
        split="uniform",  # split_meanflow: where an interval is split: uniform | midpoint
        target_ema=0.0,  # alpha_flow, split_meanflow, shortcut, terminal_velocity: of the targets
    ),
    # in the target: v_g = omega v + kappa u(class) + (1 - omega - kappa) u(no class)
    guidance=dict(
        omega=1.0,  # factor of the sample's own velocity
        kappa=0.0,  # factor of the conditional velocity, in [0, 1); scale = omega / (1 - kappa)
        t_min=0.0,  # guide only for t in [t_min, t_max]
        t_max=1.0,  # the window's end, at least t_min
        of_dropped=False,  # rows without label are guided too, by the network without label
        fade=False,  # guidance fades from t_max to t = 1; kappa's share holds everywhere
    ),
    weight=dict(  # a row's squared error l weighs (l + c)^-p
        p=1.0,  # 0 = all rows alike
        c=0.01,  # above 0; keeps the weight of a small error finite
        of="sum",  # l is the sum of a row's squared errors, or their mean: sum | mean
        of_interval=0.0,  # power of t - r that multiplies l; above 0 leaves out rows with r = t
    ),
    controls=dict(  # optional terms on any objective, along a random direction of z
        lipschitz=0.0,  # factor of relu(|du/dz n| - lipschitz_bound)^2; 0 = off
        lipschitz_bound=1.0,  # change of the field per unit of z that costs nothing
        monotone=0.0,  # factor of the term that keeps z - (t - r) u monotone in z; 0 = off
        non_expansive=0.0,  # factor of the term that lets no step part points; 0 = off
    ),
    velocity=dict(  # estimate of the flow's velocity in the place of e - x
        source="sample",  # sample (e - x) | batch | data (plug-in over either) | network | average
        target=0.0,  # its share in targets, in [0, 1]
        tangent=0.0,  # its share in the direction of du/dt and of finite steps, in [0, 1]
        of_rows=False,  # the shares are of rows, which take part whole or not at all
        ema=0.0,  # average: its decay; 1 = frozen at the start, a teacher by init.path
    ),
    perceptual=dict(  # pixel_meanflow: distances of the predicted picture to the data in its loss
        lpips=0.0,  # factor of LPIPS; 0 = off
        convnext=0.0,  # factor of the distance of ConvNeXt V2's features; 0 = off
        max_t=1.0,  # for t < max_t alone
        crop_size=224,  # side of the random crops that both networks see, in pixels
        rows_at_once=32,  # rows of a device computed at once; does not change them
        lpips_weights="lpips-vgg16",  # published name, or a folder with its two files
        convnext_weights="convnextv2-base-22k-224",  # published name, or a path
    ),
    times=dict(
        # uniform | logit_normal | consistency (r = 0) | dyadic (halved steps) | grid (the smallest
        name="logit_normal",  # of them) | gap (logit-normal t - r, then r)
        t_mean=-0.4,  # logit_normal, consistency: mean of logit t; gap: of logit (t - r)
        t_std=1.0,  # logit_normal, consistency, gap: its standard deviation
        r_mean=-0.4,  # logit_normal, gap: mean of logit r; of two draws the larger is called t
        r_std=1.0,  # logit_normal, gap: its standard deviation
        order="swap",  # uniform, logit_normal: where r > t, swap them | clip r to t - min_gap
        min_gap=0.0,  # logit_normal with clip: smallest t - r, in [0, 1)
        uniform_share=0.0,  # logit_normal: share of the rows whose times are uniform instead
        levels=7,  # dyadic, grid, model t,log2: the shortest step is 2^-levels; dyadic halves to it
    ),
    coupling=dict(  # which noise belongs to which data
        name="independent",  # independent | optimal_transport (within a condition)
        rows=0,  # optimal_transport: of so many rows among themselves; 0 = of the whole batch
    ),
    instant_times=dict(  # of rows with r = t
        name="",  # logit_normal | uniform | grid; "" = the larger of the two of `times`
        t_mean=-0.4,  # logit_normal: mean of logit t
        t_std=1.0,  # logit_normal: its standard deviation
        uniform_share=0.0,  # logit_normal: share of the rows whose time is uniform instead
    ),
    draws=dict(
        instant_share=0.75,  # share of rows with r = t, in [0, 1]
        label_drop_share=0.1,  # share of all rows trained without label or condition, in [0, 1)
        label_drop="instant_rows",  # whose: instant_rows (r = t) | any_row, for samples of none
        label_drop_window=(0.0, 1.0),  # only for t within it
        instant_of_every_row=False,  # all rows have r = t, and all a second time r < t
        omega_max=1.0,  # a network that is told guidance: scales up to this one; 1 = none
        omega_min=1.0,  # from this one on, in [1, omega_max]
        omega_power=1.0,  # their density is omega^-omega_power, at least 0
        noise_scale=1.0,  # standard deviation of the noise, in training and in sampling; above 0
    ),
    init=dict(
        path="",  # a run's workdir, or a published checkpoint; "" = start from the seed
        kind="auto",  # what lies there: auto = found | run | meanflow | imf | pmf | sit | ...
        which="",  # run: an average or none; published: a section, as params; "" = the average
    ),
    train=dict(
        num_steps=10_000,  # optimisation steps of the whole run
        batch_size=128,  # rows of a step, over all devices
        microbatch=0,  # rows computed at once, over all devices, to save memory; 0 = all
        log_every_steps=100,  # steps between rows of metrics.jsonl, which average over them
    ),
    optim=dict(
        name="adamw",  # adamw | radam | muon (matrices of linear layers; adam for all else)
        lr=1e-3,  # peak learning rate
        warmup_steps=0,  # steps of linear warm-up from 0
        schedule="constant",  # after warm-up: constant | cosine (to 0 at train.num_steps)
        b1=0.9,  # adam: decay of the first moment
        b2=0.95,  # adam: decay of the second moment
        momentum=0.95,  # muon: decay of its momentum
        weight_decay=0.0,  # decoupled
        clip_norm=0.0,  # clip gradients to this global norm; 0 = off
    ),
    ema=dict(
        decays=(0.9999,),  # each in [0, 1): one moving average of the parameters for each
        halflives_kimg=(),  # and for each half-life in thousands of images; 500.0 is named 500kimg
        every_steps=1,  # steps after which they move, by decay^every_steps; decays are per step
        rampup=0.05,  # their longest half-life, as a share of the images seen so far; 0 = no limit
    ),
    log=dict(
        sample_every_steps=1000,  # steps between sample grids; 0 = only at the end
        progress=True,  # show progress on the terminal
    ),
    checkpoint=dict(
        every_steps=1000,  # steps between checkpoints; the last step and SIGTERM always save one
        keep=3,  # newest checkpoints kept
    ),
    mesh=dict(
        data=0,  # devices that split the batch alone; 0 = all that remain
        fsdp=1,  # devices that split the batch and the parameters
        gather="step",  # step | block: gather split parameters at once, or block by block
    ),
    job=dict(  # of one or many processes
        start_timeout_seconds=300.0,  # within which all processes must have started
        heartbeat_timeout_seconds=100,  # of silence after which the others end
        stopped_exit_code=0,  # of stopped training; above 0 for schedulers that repeat failures
    ),
    sample=dict(
        num=100,  # samples to write, exactly
        steps=1,  # network evaluations of one sample: 1, 2, 4, ...
        times=(),  # or the time grid itself, e.g. (1.0, 0.5, 0.0); () = equal steps
        labels=(),  # classes or their names, repeated, -1 = none; () = all classes in turn
        condition=(),  # arrays: numbers told to all samples; () = of the held-out rows in turn
        guidance=(1.0, 0.0, 1.0),  # (omega, t_min, t_max), for a network that was told them
        renoise=False,  # each step goes to the data and back to fresh noise, as SoFlow's second
        seed=0,  # of the noise
        ema="",  # a decay or half-life (500kimg); none = the raw parameters, "" = the first
        batch_size=256,  # samples computed at once; does not change them
        # more pictures of pictures: steps (the same noise in 1, 2, 4, 8), walk (between noises),
        views=(),  # nearest (training pictures), training (an animation of its samples)
    ),
    # every combination of checkpoints, emas, steps, omegas and intervals is scored
    eval=dict(
        num_samples=2000,  # samples of each row of the table, exactly
        steps=(1, 2, 4, 8),  # network evaluations of a sample
        omegas=(1.0,),  # guidance scales, for a network that was told them
        intervals=((0.0, 1.0),),  # (t_min, t_max) of guidance, for a network that was told it
        emas=("",),  # averages: decays, half-lives (500kimg), none = raw parameters, "" = the first
        checkpoints=(),  # steps of the checkpoints; () = the newest
        renoise=False,  # see sample.renoise
        labels="data",  # classes of samples: data (in its shares) | balanced (in turn) | random
        seed=1,  # of the noise, and of random labels
        batch_size=500,  # samples computed at once; does not change them
        references=(),  # .npz files of reference statistics: FID instead of small-data scores
        inception="inception-2015-12-05",  # published name, or a path
        samples="",  # with references: score this .npz (arr_0, uint8 [N, H, W, 3]), no model
        least_samples=0,  # with references: refuse fewer samples; 0 = 2049, features and one
        watch=False,  # with references: score every new checkpoint until the run's last step
    ),
    bench=dict(
        what="step",  # step | sample | input | attention | scores (of random features) | fits
        repeats=20,  # timed runs of each thing measured; step: 0 = only compile
        dropped=3,  # runs before them, not counted
        shape=(),  # not input: of one element; () = as data.image_size says, or of the data
        num_classes=1000,  # not input: of pictures that are not read, or where shape is given
        tokens=(256, 1024),  # attention: lengths of the sequence
        devices=8,  # fits: of the machine
        memory_gb=16.0,  # fits: of one device
    ),
    weights_dir="",  # folder of published weights (--mode=weights); "" = $MF_WEIGHTS
)


def get_config() -> ConfigDict:
    """Return the defaults: MeanFlow on the 8x8 digits."""
    return ConfigDict(DEFAULTS).lock()  # a key that is not here is refused in a config file too
