"""Sample quality, arrays in and numbers out: nothing here knows a model, a data set or a run.

`frechet`, `row_pairs` and `two_sample` compare two sets of rows `[n, d]`. `classifier` and
`inception` turn pictures into rows. `suite` scores them against a `reference_file`.
"""
