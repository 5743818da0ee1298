"""A finished run or a checkpoint put to use."""
