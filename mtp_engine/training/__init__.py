"""Training MTP layers for a frozen model: the data the model writes, the objective, the run."""
