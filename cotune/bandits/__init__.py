"""Which prompt and how many completions per query, chosen under a fixed number of training completions."""
