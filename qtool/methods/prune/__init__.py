"""Methods of the kind prune."""
