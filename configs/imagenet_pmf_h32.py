"""Pixel MeanFlow on ImageNet 512x512, H/32 on pixels: 2.48 FID at one step with perceptual terms (arXiv 2601.22158).

958M parameters in sampling, 1120M in training, 360 epochs, batch 1024. Without the perceptual terms, which are no
part of this project, expect a much higher figure. The paper doubles the noise at this size; here the logits of the
times are log 2 higher, which gives the same signal to noise.
Hardware: GPUs or TPUs; about 1,020 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not
measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, omega 5.5, the average of 500 kimg, for t in [0.31,
0.86]: the published [0.1, 0.6] is of noise 4 times as strong.
Command: python -m mf_jax.main --config=configs/imagenet_pmf_h32.py
"""

from ml_collections import ConfigDict

from configs.imagenet_pmf_h16 import get_config as imagenet_pmf_h16


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_pmf_h16()
    config.data.image_size, config.model.patch_size = 512, 32
    config.times.t_mean = config.times.r_mean = 1.49
    config.sample.guidance, config.sample.ema = (5.5, 0.31, 0.86), "500kimg"
    config.eval.references = ("data/imagenet512_reference.npz",)
    config.eval.emas = ("500kimg",)
    config.eval.omegas, config.eval.intervals = (5.5,), ((0.31, 0.86),)
    return config
