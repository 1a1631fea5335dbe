"""Measuring speed: of products of codes beside their peers, and of whole models that write text."""
