"""Published weights: fetched, and read into the parameters of our networks."""
