"""Random damage to what users write: configurations and picture files. Run by hand: `python -m tests.fuzz --seed 0`."""
