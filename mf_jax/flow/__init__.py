"""The flow: records, the path, times, draws, guidance and the sampler; imports JAX and nothing of the world."""
