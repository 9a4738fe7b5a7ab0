"""What a run shows: its log, its page, sample grids and plots."""
