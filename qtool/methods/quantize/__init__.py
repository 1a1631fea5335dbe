"""Methods of the kind quantize."""
