"""Low-bit products: each module holds a torch reference and, beside it, the launch of the CUDA kernel that does the same."""
