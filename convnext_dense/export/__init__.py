"""A trained detector or segmentor as one file that runs without this package."""
