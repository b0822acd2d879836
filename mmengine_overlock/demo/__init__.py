"""The demonstration: a drawn data set of geometric shapes and a report of what was learned on it."""
