"""Methods of the kind evaluate."""
