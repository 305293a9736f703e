"""`cotune serve`: an OpenAI-compatible endpoint that applies prompt and adapter itself."""
