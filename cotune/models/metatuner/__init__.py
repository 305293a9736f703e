"""MetaTuner's networks (arXiv 2509.24245): one encoder, a prompt per query from it, an adapter per query from it."""
