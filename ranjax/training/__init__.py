"""Training of the language model: settings, metrics, the step, the loop, checkpoints, reports, a whole run."""
