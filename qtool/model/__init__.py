"""The model as the pipeline sees it: opened from a checkpoint, walked block by block, saved again."""
