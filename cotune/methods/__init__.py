"""What weights can learn from: worked answers, own accepted completions, preferences, rewards."""
