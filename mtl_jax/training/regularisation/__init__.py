"""Regularisers in a training run."""
