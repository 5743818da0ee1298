"""What every other package stands on: errors, files, trees, progress."""
