"""Look inside a model: maps of its attention, measures of its layers, and a report of both for one photo."""
