"""Whole training runs: configuration, building, data sets and models; needs the extra "train"."""
