"""Layers that compressed models are made of."""
