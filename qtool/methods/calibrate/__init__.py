"""Methods of the kind calibrate."""
