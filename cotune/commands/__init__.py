"""The commands of `cotune`, grouped. Each parses flags, calls one function and prints."""
