"""Tools that the experiments share: the table of a study, its command line, ablations."""
