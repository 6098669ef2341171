"""Interpretation of trained models: weights of states, attribution of predictions, half-lives, explanations."""
