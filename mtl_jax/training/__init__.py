"""A training run, from an experiment to results.json."""
