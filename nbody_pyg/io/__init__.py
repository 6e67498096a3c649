"""Files of models and checkpoints: what they hold, how they are checked, and how those of older versions are read."""
