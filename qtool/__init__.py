"""qtool compresses language models from one YAML recipe: calibrate, transform, quantize, prune, distill, evaluate, export."""

__version__ = "0.1.0"
