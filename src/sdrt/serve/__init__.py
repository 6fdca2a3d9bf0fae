"""`sdrt serve`: bundles behind HTTP, in one process that owns the engines."""
