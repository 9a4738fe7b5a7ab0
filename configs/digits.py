"""tmp"""

from configs.default import get_config as defaults


def get_config():
    config = defaults()
    config.train.num_steps = 4000
    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.ema.decays = (0.995,0.99,0.999)
    return config
