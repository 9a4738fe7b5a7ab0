"""tmp"""

from configs.default import get_config as defaults


def get_config():
    config = defaults()
    config.data.name = "toy2d"
    config.model.name = "mlp"
    config.model.depth = 4
    config.model.width = 256
    config.train.num_steps = 10000
    config.train.batch_size = 512
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.ema.decays = (0.995,)
    config.log.sample_every_steps = 2000
    return config
