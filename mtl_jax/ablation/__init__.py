"""Many trainings that differ in numbers, in one program."""
