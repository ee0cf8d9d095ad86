"""Hand-over of a canonical graph to other programs. One format per file."""
