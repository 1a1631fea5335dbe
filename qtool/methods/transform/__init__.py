"""Methods of the kind transform."""
