"""Number formats as data: grids, schemes, packing, and the quantized tensor that all stages share."""
