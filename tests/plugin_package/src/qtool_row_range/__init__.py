"""quantize/row_range, a method for qtool."""
