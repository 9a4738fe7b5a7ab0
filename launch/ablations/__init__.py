"""The paper's ablations in miniature on the digits, and all objectives at equal training FLOPs.

1. `GROUPS` is the table of what is run: a setting is a label, the published figure and what it changes in the
   paper's settings. Settings that name the same run share it.
2. Every run is trained and evaluated in this process, one after another, in runs/ablations/NAME; `result.json` there
   marks it as finished. A run that diverges is recorded as such.
3. The document is made from the `result.json` files alone, its sentences too, so that it is true of any rerun.
4. Settings that the method says must fail are checked to fail; if one does not, the exit code is 1.

Usage: bash launch/ablations.sh [--only=GROUP] [--document]
"""
