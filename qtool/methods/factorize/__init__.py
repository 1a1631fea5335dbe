"""Methods of the kind factorize."""
