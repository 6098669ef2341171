"""What a trained model remembers: weights of its sums, attributions of its predictions, half-lives."""
