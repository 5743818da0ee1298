"""Rows, labels and tokens: from files to the batches of a step."""
