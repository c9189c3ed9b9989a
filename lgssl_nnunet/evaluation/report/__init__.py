"""A page to look at: curves, tables, slices and a viewer in one HTML file."""
