"""Linen modules: trunks and the layers that they are made of."""
