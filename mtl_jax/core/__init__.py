"""The foundation of all other packages: errors, files, trees, progress."""
