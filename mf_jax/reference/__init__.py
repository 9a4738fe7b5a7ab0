"""Names and weights of published checkpoints, as our parameters."""
