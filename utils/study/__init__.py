"""A grid of datasets, sizes, mixes and seeds as one resumable command, and the page that says what it found."""
