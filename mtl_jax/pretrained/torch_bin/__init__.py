"""Reads files of PyTorch tensors without PyTorch, and without running the pickles in them."""
