"""Methods of the kind export."""
