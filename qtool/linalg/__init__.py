"""Mathematics that two methods share."""
