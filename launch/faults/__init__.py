"""Proof by fault: runs that are killed, stopped and starved of disk, and runs on other processes and devices."""
