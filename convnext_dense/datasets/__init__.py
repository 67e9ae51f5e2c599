"""Custom data sets: their layouts, the checks of their files, and the config that follows from them."""

SPLITS = ('train', 'val', 'test')  # of the dataloaders of a config and of a data set
