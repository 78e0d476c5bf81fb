"""What happens between logits and tokens: parameters, processors, structures, choices, stops, log-probabilities."""
