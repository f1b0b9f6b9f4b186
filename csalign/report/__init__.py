"""Pages that show results: one file each, which opens offline."""
