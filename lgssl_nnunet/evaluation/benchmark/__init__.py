"""Methods against each other: the cells of a grid, the workers that go through them, and what comes out."""
