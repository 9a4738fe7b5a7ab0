"""Sample quality, arrays in and numbers out: nothing here knows of a model, a data set or a
training run.

`frechet`, `row_pairs` and `two_sample` compare two sets of rows `[n, d]`; 2-D points are their own
features. `classifier` turns small images into such rows, by the real data themselves; `inception`
is the published network. `suite` scores batches of its features against a file of statistics
(`reference_file`).
"""
