"""Methods of the kind distill."""
