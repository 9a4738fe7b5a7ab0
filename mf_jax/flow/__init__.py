"""The flow: records, the path, times, draws, guidance and the sampler."""
