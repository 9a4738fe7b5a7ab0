"""The flow: records, the path, times, draws, guidance and the sampler; a library on JAX alone."""
