"""What an evaluation computes: its grid, its scorers, its rows."""
