"""Processes, devices, checkpoints and files."""
