"""Tools that the experiments share: a table of trainings, studies that go on, ablations."""
