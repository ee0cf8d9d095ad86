"""From a trained torch model to the canonical graph (`hwmpq.graph`)."""
