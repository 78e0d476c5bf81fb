"""One model over several processes: what each of them holds, and what they tell each other."""
