"""Methods that choose a scheme for each linear."""
