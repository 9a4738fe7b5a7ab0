"""Pixel MeanFlow on ImageNet 256x256, H/16 on pixels: 2.22 FID at one step with perceptual terms (arXiv 2601.22158).

955M parameters in sampling, 1113M in training, 360 epochs, batch 1024. Without the perceptual terms, which are no
part of this project, expect a much higher figure. The published run drew noise twice as strong at times leaning less
to noise, nearly the same distribution of signal to noise, and a tenth of its times uniformly.
Hardware: GPUs or TPUs; about 1,020 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not
measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, omega 7, the average of 1000 kimg, for t in [0.33,
0.75]: the published [0.2, 0.6] is of its stronger noise.
Command: python -m mf_jax.main --config=configs/imagenet_pmf_h16.py
"""

from ml_collections import ConfigDict

from configs.imagenet_b4 import IMAGES
from configs.imagenet_pmf_l16 import get_config as imagenet_pmf_l16


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_pmf_l16()
    config.model.size = "pixel_H"
    config.model.remat = "block"
    config.train.num_steps = 360 * IMAGES // 1024
    config.sample.guidance = (7.0, 0.33, 0.75)
    config.eval.intervals = ((0.33, 0.75),)
    return config
